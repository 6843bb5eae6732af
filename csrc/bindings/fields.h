// Reads the arguments of the kernels from NamedTuples of Python, each field by its name.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "bindings/dlpack.h"

namespace ppo_fast {

// A tensor of Python; valid while Python holds it. None has no data.
dlpack::Tensor tensor(PyObject* x);

// The position of a string among the names of an enumeration.
int choice(PyObject* text, std::initializer_list<const char*> names);

template <class T>
void assign(T*& to, PyObject* x) {
  to = static_cast<T*>(tensor(x).data);
}

// A number; None: 0.
inline void assign(int64_t& to, PyObject* x) {
  to = x == Py_None ? 0 : PyLong_AsLongLong(x);
  if (to == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
}

inline void assign(double& to, PyObject* x) {
  to = x == Py_None ? 0.0 : PyFloat_AsDouble(x);
  if (to == -1.0 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
}

inline void assign(float& to, PyObject* x) {
  double wide;
  assign(wide, x);
  to = static_cast<float>(wide);
}

// A number, or a float32 tensor of one.
inline void assign(std::optional<float>& to, PyObject* x) {
  if (x == Py_None) return to.reset();
  float number;
  if (PyFloat_Check(x) || PyLong_Check(x)) {
    assign(number, x);
  } else {
    number = *static_cast<const float*>(tensor(x).data);
  }
  to = number;
}

// Fills the members of `self` that each(visit) visits as visit(name, member) from the fields of a NamedTuple. `each` is
// a lambda expression of the call, whose type keeps the names of one call apart from those of others.
template <class Class, class Each>
void read(pybind11::handle tuple, Class& self, Each each) {
  static const std::vector<PyObject*> names = [&] {
    std::vector<PyObject*> found;
    each([&](const char* name, auto) { found.push_back(PyUnicode_InternFromString(name)); });
    return found;
  }();
  size_t at = 0;
  each([&](const char*, auto member) {
    const auto field = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(tuple.ptr(), names[at++]));
    if (!field) throw pybind11::error_already_set();
    assign(self.*member, field.ptr());
  });
}

}  // namespace ppo_fast
