// What the fused operations' tasks are made of: numbers by type, small matrix products, memory.
#ifndef CTORCH_TASKS_H
#define CTORCH_TASKS_H

#include "kernels.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <memory>

namespace chunkgrpo {

using Bits = uint16_t;

template <class T>
T *data(const at::Tensor &t) {
  return static_cast<T *>(t.data_ptr());
}
template <class F>
auto dispatch(const at::Tensor &x, F &&body) {
  return x.scalar_type() == at::kFloat ? body(float()) : body(Bits());
}

inline void multiply(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
              int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}
inline void multiply(int64_t m, int64_t n, int64_t k, const Bits *a, int64_t lda, const Bits *b, int64_t ldb, float *c,
              int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16 *>(a),
                              reinterpret_cast<const at::BFloat16 *>(b), c, true);
}
/* c [m, n] = a·b. */
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, const T *a, int64_t lda, const T *b, float *c) {
  multiply(m, n, k, a, lda, b, n, c, n, false);
}

/* Memory of one task, cut into aligned pieces. */
struct Arena {
  std::unique_ptr<char[]> memory;
  char *next;
  explicit Arena(size_t bytes) : memory(new char[bytes + 64]), next(memory.get()) {
    next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64;
  }
  template <class T>
  T *take(int64_t count) {
    T *p = reinterpret_cast<T *>(next);
    next += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

}  // namespace chunkgrpo

#endif
