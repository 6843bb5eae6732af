// The part of DLPack's C exchange API that shows a tensor: address, dtype, shape and strides in one call, without a
// header of torch. The layouts are those of dlpack.h 1.3, https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <cstdint>

namespace ppo_fast::dlpack {

enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// The table that a tensor's type publishes as the capsule `dlpack_exchange_api` in __dlpack_c_exchange_api__.
struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  void* older;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*view)(void* py_object, Tensor* out);  // 0, or -1 and an exception of Python
  void* current_stream;
};

}  // namespace ppo_fast::dlpack
