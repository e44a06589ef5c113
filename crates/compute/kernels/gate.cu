// The gate of a feed-forward layer (SwiGLU, Shazeer 2020): out = silu(gate + its bias) * (up + its bias), silu(x) = x / (1 + e^-x).
//
// Place in the flow: between the product of both halves and the down projection.
//
//   gate_up  [rows][2 * inner] bf16: the gates of a row, then its ups: the matrices one above the other
//   bias     [2 * inner] single precision, or null
//   out      [rows][inner] bf16
//
// Grid: ceil(rows * ceil(inner / 8) / 256) blocks of 256 threads, 8 values each. Where inner is not a multiple of 8, values are
// read one by one. Arrays begin at multiples of 16 bytes.
#include "rms_norm.cuh"

namespace gate {

constexpr int THREADS = 256;
using rms_norm::GROUP;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

}  // namespace gate

extern "C" __global__ void __launch_bounds__(gate::THREADS)
    silu_gate(const bf16 *gate_up, const float *bias, bf16 *out, uint32_t rows, int inner) {
    using namespace gate;
    const size_t groups = static_cast<size_t>(inner + GROUP - 1) / GROUP;
    const size_t at = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= rows * groups) return;
    const size_t row = at / groups;
    const int column = static_cast<int>(at % groups) * GROUP, count = inner - column;
    const bool whole = inner % GROUP == 0;
    const bf16 *const gates = gate_up + row * 2 * inner + column;
    float gate[GROUP], up[GROUP];
    rms_norm::load_group(gates, count, whole, gate);
    rms_norm::load_group(gates + inner, count, whole, up);
    if (bias != nullptr) {
        float gate_bias[GROUP], up_bias[GROUP];
        rms_norm::load_group(bias + column, count, whole, gate_bias);
        rms_norm::load_group(bias + inner + column, count, whole, up_bias);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) gate[i] += gate_bias[i], up[i] += up_bias[i];
    }
#pragma unroll
    for (int i = 0; i < GROUP; ++i) gate[i] = silu(gate[i]) * up[i];
    rms_norm::store_group(out + row * inner + column, count, whole, gate);
}
