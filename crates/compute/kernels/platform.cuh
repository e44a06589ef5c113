// CUDA's headers under nvcc, the emulation under a host compiler, and the few words that differ between the two.
//
// Place in the flow: everything here includes it first. See emulation/cuda_emulation.hpp for what the host runs.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>

// Shared memory as large as the launch says, 128-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// Shared memory of a size known here.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]

// Where a collective was called, in the messages of the emulation.
#define EMULATION_LOCATION

#else
#include "emulation/cuda_emulation.hpp"

#define EMULATION_LOCATION , emulation::Location where = emulation::Location::current()
#endif

using bf16 = __nv_bfloat16;
