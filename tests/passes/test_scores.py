import torch

from lpsn_tvm.passes.scores import ChannelMean, random_scores, unit_scores


def test_mean_activation_is_the_running_mean_of_batch_means():
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 5, 5), torch.randn(2, 3, 5, 5)]
    mean = ChannelMean("mean_activation")
    for batch in batches:
        mean.add(batch)
    expected = sum(batch.abs().mean(dim=(0, 2, 3)) for batch in batches) / 2
    torch.testing.assert_close(mean.value, expected.double(), rtol=1e-5, atol=1e-6)


def test_zero_fraction_counts_what_is_not_zero():
    mean = ChannelMean("zero_fraction")
    mean.add(torch.tensor([[0.0, -2.0], [3.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(mean.value, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))


def test_random_is_a_seeded_permutation():
    assert sorted(random_scores(9, 0, "g").tolist()) == list(range(9))
    assert torch.equal(random_scores(9, 0, "g"), random_scores(9, 0, "g"))
    assert not torch.equal(random_scores(9, 0, "g"), random_scores(9, 1, "g"))
    assert not torch.equal(random_scores(9, 0, "g"), random_scores(9, 0, "h"))


def test_unit_scores_average_the_channels_of_a_unit():
    scores = torch.tensor([1.0, 3.0, 5.0, 7.0]).double()
    assert unit_scores(scores, torch.tensor([0, 0, -1, 1]), 2).tolist() == [2.0, 7.0]
