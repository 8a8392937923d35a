// Inner loops of the fused CPU operations, once per instruction set; fused.cpp cuts the work into tasks.
//
// No header but <stdint.h>: inline functions of a library, compiled here for AVX-512, could be linked into code that runs
// without it.
#ifndef CTORCH_KERNELS_H
#define CTORCH_KERNELS_H

#include <stddef.h>
#include <stdint.h>

namespace chunkgrpo {

/* One attention head's queries or keys: `rows` rows of `size` numbers. */
struct HeadShape {
  int64_t rows, size;
};

/* T is float, or uint16_t holding the bits of a bfloat16. All arithmetic is in float. */
template <class T>
struct Kernels {
  /* out = LayerNorm(x)·(1 + scale) + shift, row by row; one shift and scale for all rows. */
  void (*norm)(T *out, const T *x, const T *shift, const T *scale, int64_t rows, int64_t width, float eps);
  /* Adds to dshift and dscale, writes dx. */
  void (*norm_backward)(T *dx, float *dshift, float *dscale, const T *g, const T *x, const T *scale, int64_t rows,
                        int64_t width, float eps);
  /* out = x + gate·y. */
  void (*gate)(T *out, const T *x, const T *gate, const T *y, int64_t rows, int64_t width);
  /* dy = g·gate; adds g·y to dgate. */
  void (*gate_backward)(T *dy, float *dgate, const T *g, const T *gate, const T *y, int64_t rows, int64_t width);
  /* tanh-GELU of rows with strides. */
  void (*gelu)(T *out, int64_t out_stride, const T *x, int64_t x_stride, int64_t rows, int64_t width);
  void (*gelu_backward)(T *dx, int64_t dx_stride, const T *g, int64_t g_stride, const T *x, int64_t x_stride,
                        int64_t rows, int64_t width);
  /* Rows of one head: RMS norm with `gain` (null: none), rotation by interleaved cosines and sines (null: none). */
  void (*head)(T *out, const T *x, int64_t stride, HeadShape s, const float *gain, const float *rotation, float eps);
  /* Gradient of the former: reads g [rows][size] in float, writes dx with `stride`, adds to dgain where not null. */
  void (*head_backward)(T *dx, int64_t stride, float *dgain, const float *g, const T *x, int64_t x_stride, HeadShape s,
                        const float *gain, const float *rotation, float eps);
  /* Scores have `padded` columns, a multiple of 16 so that no loop has a slow remainder; those from `size` on are
     overwritten. p = exp(factor·score − largest), 0 in the padding; inverse = 1 / Σ p. */
  void (*softmax)(T *p, float *largest, float *inverse, float *scores, HeadShape s, int64_t padded, float factor);
  /* p = exp(factor·score − largest)·inverse, ds = p·(dp − delta)·factor; both 0 in the padding. */
  void (*softmax_backward)(T *p, T *ds, float *scores, const float *dp, const float *largest, const float *inverse,
                           const float *delta, HeadShape s, int64_t padded, float factor);
  /* out [rows] = Σ a·b over a row. */
  void (*dot)(float *out, const T *a, const T *b, int64_t b_stride, HeadShape s);
  /* Copies rows with strides; out = x·factor[row] where factor is given. */
  void (*copy)(T *out, int64_t out_stride, const T *x, int64_t x_stride, HeadShape s);
  void (*scale)(T *out, int64_t out_stride, const float *x, int64_t x_stride, const float *factor, HeadShape s);
  /* out = x + bias, one bias a column. */
  void (*bias)(T *out, int64_t out_stride, const float *x, const float *bias, HeadShape s);
  /* out += x + bias, where there is one. */
  void (*accumulate)(T *out, int64_t out_stride, const float *x, const float *bias, HeadShape s);
  /* out [size][padded] = xᵀ, 0 beyond `rows`. */
  void (*transpose)(T *out, int64_t padded, const T *x, HeadShape s);
  /* out [rows][size] = xᵀ of x [size][padded]. */
  void (*transpose_float)(float *out, const float *x, int64_t padded, HeadShape s);
  /* The right factor of a matrix product: x with zero rows up to `padded`, or its transpose with zero columns up to
     `padded`. For 16-bit numbers pairs of rows are interleaved, as brgemm wants them. */
  void (*pack)(T *out, const T *x, int64_t stride, HeadShape s, int64_t padded);
  void (*pack_transposed)(T *out, const T *x, HeadShape s, int64_t padded);
  /* Of every column: its mean, and the sum of squared distances from it. */
  void (*moments)(float *mean, float *squares, const T *x, HeadShape s);
  /* silu(x·factor + addend), one factor and addend a column. */
  void (*affine_silu)(T *out, const T *x, const float *factor, const float *addend, HeadShape s);
  /* out = x + addend (null: none); out and addend have the same stride. */
  void (*add)(T *out, int64_t out_stride, const float *x, int64_t x_stride, const T *addend, HeadShape s);
  /* Every row of out is `row`. */
  void (*fill)(float *out, const float *row, HeadShape s);
};

/* For this machine. */
template <class T>
const Kernels<T> &kernels();

}  // namespace chunkgrpo

#endif
