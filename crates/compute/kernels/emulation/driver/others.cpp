// What the binaries are linked with and hardly use: candle's own kernels register themselves with the CUDA runtime when the program starts, and
// none of them is ever launched here.
#include "stand_in.hpp"

using stand_in::fail;

extern "C" {

void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *) {}
void __cudaRegisterVar(void **, char *, char *, const char *, int, std::size_t, int, int) {}

int __cudaGetKernel(void **, const void *) { fail("__cudaGetKernel", "a kernel of the runtime is launched"); }
int __cudaLaunchKernel_ptsz() { fail("__cudaLaunchKernel", "a kernel of the runtime is launched"); }
int __cudaPopCallConfiguration() { fail("__cudaPopCallConfiguration", "a kernel of the runtime is launched"); }
unsigned __cudaPushCallConfiguration() { fail("__cudaPushCallConfiguration", "a kernel of the runtime is launched"); }
int cudaFuncSetAttribute() { fail("cudaFuncSetAttribute", "a kernel of the runtime is asked for"); }
int cudaGetDevice(int *) { fail("cudaGetDevice", "the runtime is asked for"); }

int curandCreateGenerator(void **, int) { fail("curandCreateGenerator", "random numbers of cuRAND are asked for"); }
int curandDestroyGenerator(void *) { fail("curandDestroyGenerator", "random numbers of cuRAND are asked for"); }
int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { fail("curandSetPseudoRandomGeneratorSeed", "random numbers of cuRAND are asked for"); }
int curandSetStream(void *, void *) { fail("curandSetStream", "random numbers of cuRAND are asked for"); }

} // extern "C"
