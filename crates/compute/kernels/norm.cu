// What lies between two matrix products of a decoder: the product goes into the residual stream, whose norm goes into the next
// product.
//
//   residual = residual (+ delta) (+ bias)          single precision
//   out      = rms_norm(residual) * weight          bf16
//
// Place in the flow: after the output projection of attention and of the feed-forward layer, and before the output matrix,
// where there is no delta. In the last layer only rows whose state is wanted go on: `row_index` picks them out.
//
//   residual      [rows before][width]
//   row_index     [rows] row of `residual` that becomes row i, or null: row i itself
//   delta         [rows][width] bf16, numbered as what goes on, or null
//   delta_bias    [width] single precision, or null
//   weight        [width] single precision
//   residual_out  [rows][width], or null if nobody wants it. May be `residual` itself only without a `row_index`
//   out           [rows][width] bf16
//
// Grid: one block per row, `rms_norm.cuh` says of how many threads. Width at most 16384. Arrays begin at multiples of 16 bytes.
#include "rms_norm.cuh"

extern "C" __global__ void __launch_bounds__(rms_norm::MOST_THREADS)
    residual_rms_norm(const float *residual, const uint32_t *row_index, const bf16 *delta, const float *delta_bias,
                      const float *weight, float *residual_out, bf16 *out, int width, float epsilon) {
    const size_t row = blockIdx.x, from = row_index != nullptr ? row_index[row] : row;
    rms_norm::Row values;
    rms_norm::load_row(residual + from * width, width, values);
    if (delta != nullptr) rms_norm::add_row(delta + row * width, width, values);
    if (delta_bias != nullptr) rms_norm::add_row(delta_bias, width, values);
    if (residual_out != nullptr) rms_norm::store_row(residual_out + row * width, width, values);
    rms_norm::normalize(values, weight, width, epsilon);
    rms_norm::store_row(out + row * width, width, values);
}
