/* Host operations around accelerator programs, C99, nothing but libm.
 *
 * Each function equals the numpy function of the same name bit for bit (softmax: up to float rounding). Compile with
 *     cc -std=c99 -O3 -ffp-contract=off -fPIC -shared host_ops.c -o host_ops.so -lm
 * A fused multiply-add would round once where numpy rounds twice, hence -ffp-contract=off. Bytes are int8 or uint8
 * containers; `is_signed` says which. Right shifts of negative numbers are arithmetic on every compiler of a board.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HOST_OPS_VERSION 1

typedef int64_t size;

static int32_t value_of(const uint8_t *x, size i, int32_t is_signed) { return is_signed ? (int8_t)x[i] : x[i]; }

static int64_t clamp(int64_t v, int32_t low, int32_t high) { return v < low ? low : v > high ? high : v; }

/* The clamp comes before the rounding, as in the reference. */
static uint8_t to_integer(float value, int32_t zero_point, int32_t qmin, int32_t qmax)
{
    float low = (float)(qmin - zero_point), high = (float)(qmax - zero_point);
    value = value < low ? low : value;
    value = value > high ? high : value;
    return (uint8_t)((int32_t)rintf(value) + zero_point);
}

static float bounded(float value)
{
    const float limit = 1048576.0f;
    value = value < -limit ? -limit : value;
    return value > limit ? limit : value;
}

/* value * 2**exponent, rounded half up */
static int64_t scale_half_up(int64_t value, int32_t exponent)
{
    return exponent >= 0 ? value * ((int64_t)1 << exponent) : (value + (((int64_t)1 << -exponent) >> 1)) >> -exponent;
}

int32_t host_ops_version(void) { return HOST_OPS_VERSION; }
/* --- one tensor, element by element */

void quantize(const float *x, uint8_t *out, size count, float inv_scale, int32_t zero_point, int32_t qmin, int32_t qmax)
{
    for (size i = 0; i < count; i++)
        out[i] = to_integer(x[i] * inv_scale, zero_point, qmin, qmax);
}

void dequantize(const uint8_t *q, float *out, size count, int32_t is_signed, float scale, int32_t zero_point)
{
    for (size i = 0; i < count; i++)
        out[i] = (float)(value_of(q, i, is_signed) - zero_point) * scale;
}

void dequantize_int32(const int32_t *q, float *out, size count, float scale, int32_t zero_point)
{
    for (size i = 0; i < count; i++)
        out[i] = (float)(q[i] - zero_point) * scale;
}

/* One factor per channel; element i belongs to channel (i / inner) % channels. */
void scale_int32(const int32_t *acc, const float *scale, float *out, size count, size channels, size inner)
{
    for (size start = 0; start < count; start += inner)
        for (size i = start; i < start + inner; i++)
            out[i] = (float)acc[i] * scale[start / inner % channels];
}

void requantize(const uint8_t *q, uint8_t *out, size count, int32_t is_signed, float multiplier, int32_t in_zero_point,
                int32_t out_zero_point, int32_t qmin, int32_t qmax)
{
    for (size i = 0; i < count; i++)
        out[i] = to_integer((float)(value_of(q, i, is_signed) - in_zero_point) * multiplier, out_zero_point, qmin,
                            qmax);
}

void requantize_half_up(const uint8_t *q, uint8_t *out, size count, int32_t is_signed, int32_t exponent, int32_t qmin,
                        int32_t qmax)
{
    for (size i = 0; i < count; i++)
        out[i] = (uint8_t)clamp(scale_half_up(value_of(q, i, is_signed), exponent), qmin, qmax);
}

/* Tables of `channels` x `entries` elements of `item` bytes; element i belongs to channel (i / inner) % channels. */
void lookup(const uint8_t *q, const uint8_t *table, uint8_t *out, size count, int32_t is_signed, int32_t qmin,
            size channels, size inner, size entries, int32_t item)
{
    for (size start = 0; start < count; start += inner) {
        const uint8_t *row = table + (start / inner) % channels * entries * item;
        size end = start + inner < count ? start + inner : count;
        if (item == 1)
            for (size i = start; i < end; i++)
                out[i] = row[value_of(q, i, is_signed) - qmin];
        else
            for (size i = start; i < end; i++)
                memcpy(out + i * item, row + (size)(value_of(q, i, is_signed) - qmin) * item, (size_t)item);
    }
}

/* --- two tensors */

void add(const uint8_t *a, const uint8_t *b, uint8_t *out, size count, int32_t a_signed, int32_t b_signed,
         float a_multiplier, float b_multiplier, int32_t a_zero_point, int32_t b_zero_point, int32_t out_zero_point,
         int32_t qmin, int32_t qmax)
{
    for (size i = 0; i < count; i++) {
        float left = bounded((float)(value_of(a, i, a_signed) - a_zero_point) * a_multiplier);
        float right = bounded((float)(value_of(b, i, b_signed) - b_zero_point) * b_multiplier);
        out[i] = to_integer(left + right, out_zero_point, qmin, qmax);
    }
}

/* (a << a_left) + (b << b_left), `shift` right, rounded half up */
void add_half_up(const uint8_t *a, const uint8_t *b, uint8_t *out, size count, int32_t a_signed, int32_t b_signed,
                 int32_t a_left, int32_t b_left, int32_t shift, int32_t qmin, int32_t qmax)
{
    for (size i = 0; i < count; i++) {
        int64_t left = value_of(a, i, a_signed) * ((int64_t)1 << a_left);
        int64_t right = value_of(b, i, b_signed) * ((int64_t)1 << b_left);
        out[i] = (uint8_t)clamp(scale_half_up(left + right, -shift), qmin, qmax);
    }
}

/* One element of b per `inner` elements of a: 1, or H * W for a factor per channel. */
void multiply(const uint8_t *a, const uint8_t *b, uint8_t *out, size count, size inner, int32_t a_signed,
              int32_t b_signed, float multiplier, int32_t a_zero_point, int32_t b_zero_point, int32_t out_zero_point,
              int32_t qmin, int32_t qmax)
{
    for (size start = 0; start < count; start += inner) {
        int32_t factor = value_of(b, start / inner, b_signed) - b_zero_point;
        for (size i = start; i < start + inner; i++) {
            int32_t product = (value_of(a, i, a_signed) - a_zero_point) * factor;
            out[i] = to_integer((float)product * multiplier, out_zero_point, qmin, qmax);
        }
    }
}

/* --- windows and rows */

void max_pool2d(const uint8_t *x, uint8_t *out, size planes, size height, size width, size out_height, size out_width,
                const int32_t *window, int32_t is_signed)
{
    /* window: kernel h, w; strides h, w; top, left; dilation h, w */
    for (size p = 0; p < planes; p++, x += height * width)
        for (size oy = 0; oy < out_height; oy++)
            for (size ox = 0; ox < out_width; ox++) {
                int32_t best = is_signed ? -128 : 0;
                for (size r = 0; r < window[0]; r++)
                    for (size s = 0; s < window[1]; s++) {
                        size y = oy * window[2] - window[4] + r * window[6];
                        size z = ox * window[3] - window[5] + s * window[7];
                        if (y < 0 || y >= height || z < 0 || z >= width)
                            continue;
                        int32_t value = value_of(x, y * width + z, is_signed);
                        best = value > best ? value : best;
                    }
                *out++ = (uint8_t)best;
            }
}

void global_avg_pool2d(const uint8_t *x, uint8_t *out, size planes, size pixels, int32_t is_signed, float multiplier,
                       int32_t in_zero_point, int32_t out_zero_point, int32_t qmin, int32_t qmax)
{
    for (size p = 0; p < planes; p++, x += pixels) {
        int32_t total = 0;
        for (size i = 0; i < pixels; i++)
            total += value_of(x, i, is_signed);
        total -= (int32_t)pixels * in_zero_point;
        out[p] = to_integer((float)total * multiplier, out_zero_point, qmin, qmax);
    }
}

/* The mean as (sum * factor) rounded half up by `shift` bits. */
void global_avg_pool2d_half_up(const uint8_t *x, uint8_t *out, size planes, size pixels, int32_t is_signed,
                               int32_t factor, int32_t shift, int32_t qmin, int32_t qmax)
{
    for (size p = 0; p < planes; p++, x += pixels) {
        int64_t total = 0;
        for (size i = 0; i < pixels; i++)
            total += value_of(x, i, is_signed);
        out[p] = (uint8_t)clamp(scale_half_up(total * factor, -shift), qmin, qmax);
    }
}

void resize_linear(const uint8_t *x, uint8_t *out, size planes, size height, size width, size out_height,
                   size out_width, int32_t is_signed, const int32_t *rows, const int32_t *row_weights,
                   const int32_t *columns, const int32_t *column_weights, int32_t qmin, int32_t qmax)
{
    for (size p = 0; p < planes; p++, x += height * width)
        for (size i = 0; i < out_height; i++) {
            const uint8_t *first = x + rows[2 * i] * width, *second = x + rows[2 * i + 1] * width;
            for (size j = 0; j < out_width; j++) {
                int32_t c0 = columns[2 * j], c1 = columns[2 * j + 1];
                int32_t left = value_of(first, c0, is_signed) * row_weights[2 * i]
                             + value_of(second, c0, is_signed) * row_weights[2 * i + 1];
                int32_t right = value_of(first, c1, is_signed) * row_weights[2 * i]
                              + value_of(second, c1, is_signed) * row_weights[2 * i + 1];
                int32_t sum = left * column_weights[2 * j] + right * column_weights[2 * j + 1];
                *out++ = (uint8_t)clamp((sum + (1 << 13)) >> 14, qmin, qmax);
            }
        }
}

void float_softmax(const float *x, float *out, size outer, size length, size inner)
{
    for (size o = 0; o < outer; o++)
        for (size i = 0; i < inner; i++) {
            const float *row = x + o * length * inner + i;
            float *result = out + o * length * inner + i, high = row[0];
            double total = 0;
            for (size k = 1; k < length; k++)
                high = row[k * inner] > high ? row[k * inner] : high;
            for (size k = 0; k < length; k++)
                total += exp((double)row[k * inner] - (double)high);
            for (size k = 0; k < length; k++)
                result[k * inner] = (float)(exp((double)row[k * inner] - (double)high) / total);
        }
}

/* --- layers that the accelerator does not take (all zero points 0) */

enum { FLOAT32 = 0, HALF_EVEN = 1, HALF_UP = 2 };

/* One row of accumulators of one channel -> output elements; `scale` is the multiplier, for HALF_UP the shift. */
static void finish_row(const int32_t *acc, void *out, size first, size count, int32_t bias, float scale, int32_t mode,
                       int32_t out_zero_point, int32_t qmin, int32_t qmax)
{
    for (size i = 0; i < count; i++) {
        int32_t total = acc[i] + bias;
        if (mode == FLOAT32)
            ((float *)out)[first + i] = (float)total * scale;
        else if (mode == HALF_EVEN)
            ((uint8_t *)out)[first + i] = to_integer((float)total * scale, out_zero_point, qmin, qmax);
        else
            ((uint8_t *)out)[first + i] = (uint8_t)clamp(scale_half_up(total, -(int32_t)scale), qmin, qmax);
    }
}

/* acc[i] += weight * row[i * stride + offset] wherever that lies within [0, width) */
static void accumulate(int32_t *acc, size count, const uint8_t *row, size width, size stride, size offset,
                       int32_t weight, int32_t is_signed)
{
    size begin = offset < 0 ? (-offset + stride - 1) / stride : 0;
    size end = offset >= width ? 0 : (width - 1 - offset) / stride + 1;
    end = end < count ? end : count;
    if (is_signed && stride == 1)
        for (size i = begin; i < end; i++)
            acc[i] += weight * (int8_t)row[i + offset];
    else
        for (size i = begin; i < end; i++)
            acc[i] += weight * value_of(row, i * stride + offset, is_signed);
}

/* shape: n, channels, height, width, out channels, out height, out width, kernel h, kernel w, stride h, stride w, top,
 * left, dilation h, dilation w, groups. Returns 0, or 1 when memory is short. */
int32_t conv2d(const uint8_t *x, const int8_t *weight, const int32_t *bias, const float *scale, void *out,
               const int32_t *shape, int32_t is_signed, int32_t mode, int32_t out_zero_point, int32_t qmin,
               int32_t qmax)
{
    size channels = shape[1], height = shape[2], width = shape[3], outputs = shape[4], oh = shape[5], ow = shape[6];
    size kh = shape[7], kw = shape[8], fan_in = channels / shape[15], per_group = outputs / shape[15];
    int32_t *acc = malloc(sizeof(int32_t) * (size_t)(ow > 0 ? ow : 1));
    if (acc == NULL)
        return 1;
    for (size no = 0; no < shape[0] * outputs; no++) {
        size o = no % outputs, first = o / per_group * fan_in;
        for (size oy = 0; oy < oh; oy++) {
            memset(acc, 0, sizeof(int32_t) * (size_t)ow);
            for (size c = 0; c < fan_in; c++)
                for (size r = 0; r < kh; r++) {
                    size y = oy * shape[9] - shape[11] + r * shape[13];
                    if (y < 0 || y >= height)
                        continue;
                    const uint8_t *row = x + ((no / outputs * channels + first + c) * height + y) * width;
                    for (size s = 0; s < kw; s++)
                        accumulate(acc, ow, row, width, shape[10], s * shape[14] - shape[12],
                                   weight[((o * fan_in + c) * kh + r) * kw + s], is_signed);
                }
            finish_row(acc, out, (no * oh + oy) * ow, ow, bias[o], scale[o], mode, out_zero_point, qmin, qmax);
        }
    }
    free(acc);
    return 0;
}

/* x [rows, fan_in], weight [fan_in, outputs] */
int32_t dense(const uint8_t *x, const int8_t *weight, const int32_t *bias, const float *scale, void *out, size rows,
              size fan_in, size outputs, int32_t is_signed, int32_t mode, int32_t out_zero_point, int32_t qmin,
              int32_t qmax)
{
    int32_t *acc = malloc(sizeof(int32_t) * (size_t)(outputs > 0 ? outputs : 1));
    if (acc == NULL)
        return 1;
    for (size n = 0; n < rows; n++) {
        memset(acc, 0, sizeof(int32_t) * (size_t)outputs);
        for (size k = 0; k < fan_in; k++) {
            int32_t value = value_of(x, n * fan_in + k, is_signed);
            for (size m = 0; m < outputs; m++)
                acc[m] += value * weight[k * outputs + m];
        }
        for (size m = 0; m < outputs; m++)
            finish_row(acc + m, out, n * outputs + m, 1, bias[m], scale[m], mode, out_zero_point, qmin, qmax);
    }
    free(acc);
    return 0;
}

/* --- tiles: [n / batch][channel / block][y][x][batch][block], `bits` bits per value, low bits first */

static size tile_index(const int32_t *shape, size n, size c, size pixel)
{
    /* shape: n, channels, pixels, batch, block */
    size blocks = (shape[1] + shape[4] - 1) / shape[4];
    size tile = (n / shape[3] * blocks + c / shape[4]) * shape[2] + pixel;
    return (tile * shape[3] + n % shape[3]) * shape[4] + c % shape[4];
}

/* `out` must be zero: what lies beyond the last sample and channel stays so. */
void pack_tiles(const int8_t *x, uint8_t *out, const int32_t *shape, int32_t bits)
{
    uint8_t mask = (uint8_t)((1 << bits) - 1);
    for (size n = 0; n < shape[0]; n++)
        for (size c = 0; c < shape[1]; c++) {
            size first = tile_index(shape, n, c, 0), step = (size)shape[3] * shape[4];
            for (size pixel = 0; pixel < shape[2]; pixel++) {
                size bit = (first + pixel * step) * bits;
                out[bit >> 3] |= (uint8_t)(((uint8_t)*x++ & mask) << (bit & 7));
            }
        }
}

void unpack_tiles(const uint8_t *tiles, int8_t *out, const int32_t *shape, int32_t bits)
{
    int32_t spare = 8 - bits;
    for (size n = 0; n < shape[0]; n++)
        for (size c = 0; c < shape[1]; c++) {
            size first = tile_index(shape, n, c, 0), step = (size)shape[3] * shape[4];
            for (size pixel = 0; pixel < shape[2]; pixel++) {
                size bit = (first + pixel * step) * bits;
                uint8_t raw = (uint8_t)((tiles[bit >> 3] >> (bit & 7)) << spare);
                *out++ = (int8_t)((int8_t)raw >> spare);
            }
        }
}

/* int32 values in `planes` planes of `bits` bits, lowest first; fewer than 32 bits are sign-extended. */
void unpack_planes(const uint8_t *tiles, int32_t *out, const int32_t *shape, int32_t bits, int32_t planes,
                   size plane_values)
{
    int32_t spare = 32 - bits * planes;
    uint32_t mask = (1u << bits) - 1;
    for (size n = 0; n < shape[0]; n++)
        for (size c = 0; c < shape[1]; c++)
            for (size pixel = 0; pixel < shape[2]; pixel++) {
                size index = tile_index(shape, n, c, pixel);
                uint32_t value = 0;
                for (int32_t p = 0; p < planes; p++) {
                    size bit = (p * plane_values + index) * bits;
                    value |= ((uint32_t)(tiles[bit >> 3] >> (bit & 7)) & mask) << (p * bits);
                }
                *out++ = (int32_t)(value << spare) >> spare;
            }
}

/* Lanes gathered from an image. shape: n, channels, height, width, batch, block, tile rows, tile columns, stride y,
 * stride x, low bits, lanes. A lane: channel (-1: zeros), dy, dx, part (0 whole, 1 high, 2 low), where low is the
 * signed remainder and high the rest, q == (high << low bits) + low. `out` must be zero. */
void pack_gather(const int8_t *x, uint8_t *out, const int32_t *shape, const int32_t *lanes, int32_t bits)
{
    size height = shape[2], width = shape[3], batch = shape[4], block = shape[5], rows = shape[6], columns = shape[7];
    size blocks = (shape[11] + block - 1) / block;
    int32_t half = (1 << shape[10]) >> 1;
    uint8_t mask = (uint8_t)((1 << bits) - 1);
    for (size n = 0; n < shape[0]; n++)
        for (size l = 0; l < shape[11]; l++) {
            const int32_t *lane = lanes + 4 * l;
            if (lane[0] < 0)
                continue;
            const int8_t *plane = x + (n * shape[1] + lane[0]) * height * width;
            size first = (n / batch * blocks + l / block) * rows * columns;
            for (size i = 0; i < rows; i++) {
                size y = i * shape[8] + lane[1];
                if (y < 0 || y >= height)
                    continue;
                for (size j = 0; j < columns; j++) {
                    size z = j * shape[9] + lane[2];
                    if (z < 0 || z >= width)
                        continue;
                    int32_t value = plane[y * width + z], high = (value + half) >> shape[10];
                    int32_t low = value - high * (1 << shape[10]);
                    uint8_t part = (uint8_t)(lane[3] == 0 ? value : lane[3] == 1 ? high : low);
                    size bit = (((first + i * columns + j) * batch + n % batch) * block + l % block) * bits;
                    out[bit >> 3] |= (uint8_t)((part & mask) << (bit & 7));
                }
            }
        }
}
