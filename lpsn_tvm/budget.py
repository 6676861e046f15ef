"""How long tuning may take: a number of trials or an amount of time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lpsn_tvm.errors import RecipeError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """Trials or seconds; the other one is None.

    Parameters
    ----------
    trials : int, optional
        Configurations that are built and timed, over all kernels.
    seconds : float, optional
    """

    trials: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, value: int | str, where: str = "tune") -> Budget:
        """200 or "200" -> trials; "90s", "10m", "1.5h" -> time.

        Raises
        ------
        RecipeError
            It is neither, or not positive.
        """
        text = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
        matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
        number, unit = (float(matched[1]), matched[2]) if matched else (0.0, "")
        if number > 0 and unit:
            return cls(seconds=number * UNITS[unit])
        if number >= 1 and number == int(number):
            return cls(trials=int(number))
        raise RecipeError(
            f'must be a number of trials, such as 200, or a time: "90s", "10m", "1h"; got {value!r}', where=where
        )

    def __str__(self) -> str:
        return f"{self.trials} trials" if self.trials is not None else f"{self.seconds:g} s"
