// The extension module: tensors arrive through DLPack's C exchange API, so no torch header is needed and one build
// serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/fields.h"
#include "bindings/rows.h"
#include "gae/gae.h"

namespace py = pybind11;

namespace ppo_fast {

// [B, T], or packed [N], which has no stride of the sequences.
static void assign(MatrixView& to, PyObject* x) {
  const dlpack::Tensor given = tensor(x);
  if (given.data == nullptr) return;
  to = {given.data, given.ndim == 2 ? given.strides[0] : 0, given.strides[given.ndim - 1]};
}

namespace {

dlpack::Tensor field(py::handle tuple, const char* name) {
  const py::object found = tuple.attr(name);
  return tensor(found.ptr());
}

Dtype dtype_of(const dlpack::Tensor& x) {
  if (x.code == dlpack::kBfloat) return Dtype::kBFloat16;
  return x.bits == 64 ? Dtype::kFloat64 : x.bits == 16 ? Dtype::kFloat16 : Dtype::kFloat32;
}

GaeArguments gae_arguments(py::handle inputs, py::handle results) {
  GaeArguments args{};
  const dlpack::Tensor rewards = field(inputs, "rewards"), cu_seqlens = field(inputs, "cu_seqlens");
  args.cu_seqlens_is_int64 = cu_seqlens.bits == 64;
  args.sequences = cu_seqlens.ndim == 0 ? rewards.shape[0] : cu_seqlens.shape[0] - 1;
  args.steps = rewards.shape[rewards.ndim - 1];
  args.carry = choice(inputs.attr("mask_mode").ptr(), {"carry", "zero"}) == 0;
  read(inputs, args, [](auto visit) { GaeArguments::inputs(visit); });
  read(results, args, [](auto visit) { GaeArguments::results(visit); });
  return args;
}

void gae_cpu(py::handle inputs, py::handle results, int threads) {
  const GaeArguments args = gae_arguments(inputs, results);
  const Dtype dtype = dtype_of(field(inputs, "rewards"));
  const py::gil_scoped_release release;
  cpu::gae(args, dtype, threads);
}

#ifdef PPO_FAST_CUDA
void gae_cuda(py::handle inputs, py::handle results, std::uintptr_t stream) {
  const GaeArguments args = gae_arguments(inputs, results);
  const dlpack::Tensor rewards = field(inputs, "rewards");
  const Dtype dtype = dtype_of(rewards), values_dtype = dtype_of(field(inputs, "values"));
  const py::gil_scoped_release release;
  cuda::gae(args, dtype, values_dtype, rewards.device_id, stream);
}
#endif

}  // namespace
}  // namespace ppo_fast

PYBIND11_MODULE(_C, m) {
  using namespace ppo_fast;
  m.doc() = "Native kernels of ppo_fast. Arguments are unchecked: call the functions of ppo_fast.ops.";
  m.def("gae_cpu", &gae_cpu);
  bind_rows(m);
#ifdef PPO_FAST_CUDA
  m.attr("has_cuda") = true;
  m.def("gae_cuda", &gae_cuda);
#else
  m.attr("has_cuda") = false;
#endif
}
