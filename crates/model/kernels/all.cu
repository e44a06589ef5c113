// All kernels, compiled as one module: what build.rs hands to nvcc. A new kernel is included here, and listed in emulation/library.cpp.
#include "branch_rows.cu"
#include "embed.cu"
#include "expand.cu"
#include "expand_small.cu"
#include "fill.cu"
#include "gate.cu"
#include "log_sum_exp.cu"
#include "norm.cu"
#include "rotary_store.cu"
// Last: what they share has names at the outermost level.
#include "branch_attention.cu"
#include "pointwise_attention.cu"
#include "prefill_attention.cu"
