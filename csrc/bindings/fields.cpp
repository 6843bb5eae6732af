#include "bindings/fields.h"

#include <stdexcept>

namespace py = pybind11;

namespace ppo_fast {
namespace {

const dlpack::ExchangeApi& exchange_api(PyObject* tensor) {
  static const auto* const api = [&] {
    const py::capsule capsule = py::type::handle_of(tensor).attr("__dlpack_c_exchange_api__");
    const auto* const found = capsule.get_pointer<const dlpack::ExchangeApi>();
    if (found->major != 1) throw std::runtime_error("expected version 1 of DLPack's exchange API");
    return found;
  }();
  return *api;
}

}  // namespace

dlpack::Tensor tensor(PyObject* x) {
  dlpack::Tensor out{};
  if (x != Py_None && exchange_api(x).view(x, &out) != 0) throw py::error_already_set();
  return out;
}

int choice(PyObject* text, std::initializer_list<const char*> names) {
  int at = 0;
  for (const char* name : names) {
    if (PyUnicode_CompareWithASCIIString(text, name) == 0) return at;
    ++at;
  }
  throw py::value_error("an unknown option");
}

}  // namespace ppo_fast
