// Random weights, so that a shape can be timed without its checkpoint.
//
// values[i] = deviation * normal(seed, i), rounded to bf16: a function of the seed and the place alone. Uniform numbers come from
// the finaliser of SplitMix64 (Steele, Lea, Flood 2014), normal ones from those by Box and Muller (1958).
//
// Grid: any number of blocks of any size; each thread goes on by the whole grid.
#include "platform.cuh"

namespace fill {

__device__ __forceinline__ unsigned long long mix(unsigned long long x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

}  // namespace fill

extern "C" __global__ void fill_normal(bf16 *values, unsigned long long count, uint32_t seed, float deviation) {
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    for (unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const unsigned long long bits = fill::mix(i ^ (static_cast<unsigned long long>(seed) << 40));
        // In (0, 1], so that the logarithm is finite.
        const float first = (static_cast<float>(bits >> 40) + 1.0f) * 0x1p-24f;
        const float second = static_cast<float>(bits & 0xffffffu) * 0x1p-24f;
        values[i] = __float2bfloat16_rn(deviation * sqrtf(-2.0f * logf(first)) * cosf(6.283185307f * second));
    }
}
