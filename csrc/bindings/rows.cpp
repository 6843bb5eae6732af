#include "bindings/rows.h"

#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/fields.h"
#include "cpu/huge_pages.h"
#include "cpu/rows/dispatch.h"
#include "cpu/rows/ops.h"

namespace py = pybind11;

namespace ppo_fast {

// Found by read(), as the overloads of fields.h are.
namespace cpu {

static LogitsView logits_view(const dlpack::Tensor& x) {
  if (x.data == nullptr) return {};
  return {x.data, x.strides[0], x.strides[1], x.code == dlpack::kBfloat, false};
}

static void assign(LogitsView& to, PyObject* x) { to = logits_view(tensor(x)); }

static void assign(TargetsView& to, PyObject* x) {
  const dlpack::Tensor given = tensor(x);
  if (given.data == nullptr) return;
  const int64_t steps = given.shape[given.ndim - 1], stride_t = given.strides[given.ndim - 1];
  to = {given.data, given.ndim == 2 ? given.strides[0] : steps * stride_t, stride_t, given.bits == 64};
}

static void assign(PolicyObjective& to, PyObject* x) { to = PolicyObjective(choice(x, {"clip", "cispo"})); }

static void assign(KlEstimator& to, PyObject* x) { to = KlEstimator(choice(x, {"k1", "k2", "k3", "full"})); }

}  // namespace cpu

namespace {

using namespace cpu;

// The fields that RowInputs and SampleInputs share.
Rows rows_of_logits(py::handle inputs) {
  const py::object logits = inputs.attr("logits");
  const dlpack::Tensor given = tensor(logits.ptr());
  Rows rows{};
  rows.logits = logits_view(given);
  rows.steps = given.shape[1];
  rows.rows = given.shape[0] * rows.steps;
  rows.vocab = given.shape[2];
  read(inputs, rows, [](auto visit) { visit("temperature", &Rows::temperature); });
  return rows;
}

Rows rows_of(py::handle inputs) {
  Rows rows = rows_of_logits(inputs);
  read(inputs, rows, [](auto visit) { Rows::inputs(visit); });
  return rows;
}

// Where a gradient goes: nowhere, over the logits, or into a buffer of its own. A large one is written past the cache,
// but only in whole lines, of which short rows of an odd size have few.
LogitsView gradient_view(py::handle gradient, const Rows& rows, bool large) {
  constexpr int64_t kLine = 64, kPage = 4096;
  const dlpack::Tensor given = tensor(gradient.ptr());
  LogitsView view = logits_view(given);
  if (large && view.data != rows.logits.data) {
    const int64_t row_bytes = rows.vocab * given.bits / 8;
    advise_huge_pages(view.data, static_cast<size_t>(rows.rows * row_bytes));
    view.streamed = row_bytes >= kPage || row_bytes % kLine == 0;
  }
  return view;
}

void bind_token_stats(py::module_& m) {
  m.def("token_stats", [](py::handle rows, py::handle stats, int threads) {
    TokenStatsArguments args{};
    args.in = rows_of(rows);
    read(stats, args, [](auto visit) { TokenStatsArguments::results(visit); });
    const py::gil_scoped_release release;
    token_stats(args, threads);
  });
  m.def("token_stats_backward",
        [](py::handle grads, py::handle rows, py::handle stats, py::handle gradient, bool large, int threads) {
          TokenStatsBackwardArguments args{};
          args.in = rows_of(rows);
          args.out = gradient_view(gradient, args.in, large);
          read(grads, args, [](auto visit) { TokenStatsBackwardArguments::grads(visit); });
          read(stats, args, [](auto visit) { TokenStatsBackwardArguments::stats(visit); });
          const py::gil_scoped_release release;
          token_stats_backward(args, threads);
        });
}

void bind_policy_loss(py::module_& m) {
  m.def("policy_loss", [](py::handle rows, py::handle policy, py::handle token_weights, py::handle result,
                          py::handle gradient, bool large, int threads) {
    PolicyLossArguments args{};
    args.stats.in = rows_of(rows);
    if (!targets_fit(args.stats.in)) return false;
    args.gradient = gradient_view(gradient, args.stats.in, large);
    assign(args.token_weights, token_weights.ptr());
    read(policy, args, [](auto visit) { PolicyLossArguments::inputs(visit); });
    read(result, args, [](auto visit) { PolicyLossArguments::results(visit); });
    read(result, args.stats, [](auto visit) { TokenStatsArguments::results(visit); });
    const py::gil_scoped_release release;
    policy_loss(args, threads);
    return true;
  });
}

void bind_value_loss(py::module_& m) {
  m.def("value_loss", [](py::handle inputs, py::handle token_weights, py::handle result, int threads) {
    const py::object given = inputs.attr("values");
    const dlpack::Tensor values = tensor(given.ptr());
    ValueLossArguments args{};
    args.bfloat16 = values.code == dlpack::kBfloat;
    args.rows = 1;
    for (int i = 0; i < values.ndim; ++i) args.rows *= values.shape[i];
    assign(args.token_weights, token_weights.ptr());
    read(inputs, args, [](auto visit) { ValueLossArguments::inputs(visit); });
    read(result, args, [](auto visit) { ValueLossArguments::results(visit); });
    const py::gil_scoped_release release;
    value_loss(args, threads);
  });
}

void bind_sample_tokens(py::module_& m) {
  m.def("sample_tokens", [](py::handle inputs, py::handle result, int threads) {
    SampleArguments args{};
    args.in = rows_of_logits(inputs);
    read(inputs, args, [](auto visit) { SampleArguments::inputs(visit); });
    read(result, args, [](auto visit) { SampleArguments::results(visit); });
    const py::gil_scoped_release release;
    sample_tokens(args, threads);
  });
}

}  // namespace

void bind_rows(py::module_& m) {
  bind_token_stats(m);
  bind_policy_loss(m);
  bind_value_loss(m);
  bind_sample_tokens(m);
  m.def(
      "advise_huge_pages",
      [](std::uintptr_t data, size_t bytes) { advise_huge_pages(reinterpret_cast<void*>(data), bytes); },
      py::arg("data"), py::arg("bytes"));
  m.def("isas", &isas);
  m.def("isa", &isa);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def(
      "elementary",
      [](const char* f, std::uintptr_t x, std::uintptr_t y, int64_t n) {
        kernels().elementary(f, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), n);
      },
      py::arg("f"), py::arg("x"), py::arg("y"), py::arg("n"));
}

}  // namespace ppo_fast
