// Stands for the CUDA runtime under the host code that nvcc compiled: every launch is told to Python, and none is run.
// It stands for what of torch needs a device too, so that the ops take CPU tensors, as torch.ops.lbdt_recorded.
// Linked with -Bsymbolic, these come before those of the libraries.

#include <cuda_runtime_api.h>

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

// kernel: its name in the PTX. shape: three of the grid and three of the block. shared: dynamic bytes. asked: what the
// kernel was allowed of them beyond the limit that holds for all, 0: nothing. arguments: a pointer to each parameter.
using Tell = void (*)(const char* kernel, const unsigned* shape, uint64_t shared, int asked, void** arguments);

struct Kernel {
  std::string name;
  int asked = 0;
};

// What is registered before main, in whatever order the files' constructors run.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> known;
  return known;
}

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
} configuration;

Tell tell = nullptr;
int units = 1;

}  // namespace

extern "C" {

// Whom to tell of launches on a device of so many multiprocessors.
void record_launches(Tell to, int multiprocessors) {
  tell = to;
  units = multiprocessors;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(
    const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const auto found = kernels().find(host);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  const unsigned shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  tell(found->second.name.c_str(), shape, shared, found->second.asked, arguments);
  return cudaSuccess;
}

// From CUDA 13 on a launch goes by a handle, here the address of the host's function.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;
  kernels().at(host).asked = value;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorNotSupported;
  *value = units;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }

void torch_c10_cuda_check_msg(int32_t error, const char*, const char* function, uint32_t, bool, char** message) {
  if (error != cudaSuccess) *message = strdup((std::string(function) + ": not in recorded_launches.cpp").c_str());
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }

int32_t aoti_torch_library_init_impl(
    const char*, const char*, const char* file, uint32_t line, void** library) {
  using Init = int32_t (*)(const char*, const char*, const char*, uint32_t, void**);
  static const auto init = reinterpret_cast<Init>(dlsym(RTLD_NEXT, "aoti_torch_library_init_impl"));
  return init("lbdt_recorded", "CPU", file, line, library);
}

}  // extern "C"
