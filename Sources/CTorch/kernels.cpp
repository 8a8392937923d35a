// See kernels.h. Compiled once per instruction set, which INSTRUCTIONS names.
#include "kernels.h"

namespace {

using namespace chunkgrpo;
using Bits = uint16_t;

inline float get(float v) { return v; }
inline float get(Bits v) { return __builtin_bit_cast(float, uint32_t(v) << 16); }
template <class T>
inline T put(float v);
template <>
inline float put<float>(float v) {
  return v;
}
/* To nearest, ties to even. A NaN stays one: those that arithmetic makes, or that were bfloat16, end in zeros. */
template <>
inline Bits put<Bits>(float v) {
  uint32_t u = __builtin_bit_cast(uint32_t, v);
  return Bits((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* eˣ of x ≤ 88 as 2ⁿ·2ᶠ, |f| ≤ ½, 1e-38 below −87.3: relative error below 2e-7·(1 + |x|). Nothing in it may lose by
   regrouping, which the compiler is allowed here for the sake of sums. */
inline float exponential(float x) {
  float t = (x < -87.33f ? -87.33f : x) * 1.44269504088896341f;
  float n = __builtin_rintf(t), f = t - n;
  // Cephes' exp2f.
  float p = 1.535336188319500e-4f;
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, p) + (int32_t(n) << 23));
}

constexpr float root = 0.7978845608028654f, cubic = 0.044715f;  // √(2/π)
/* (1 + tanh u)/2 with GELU's u = √(2/π)·(x + 0.044715·x³). */
inline float sigmoid(float x) {
  float u = -2.0f * root * (x + cubic * x * x * x);
  return 1.0f / (1.0f + exponential(u < 87.0f ? u : 87.0f));
}

struct Moments {
  float mean, inverse;
};

template <class T>
inline Moments moments(const T *x, int64_t width, float eps) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) sum += get(x[i]);
  float mean = sum / float(width);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; i++) {
    float d = get(x[i]) - mean;
    squares += d * d;
  }
  return {mean, 1.0f / __builtin_sqrtf(squares / float(width) + eps)};
}

template <class T>
void norm(T *out, const T *x, const T *shift, const T *scale, int64_t rows, int64_t width, float eps) {
  for (int64_t r = 0; r < rows; r++, x += width, out += width) {
    Moments m = moments(x, width, eps);
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      out[i] = put<T>((get(x[i]) - m.mean) * m.inverse * (1.0f + get(scale[i])) + get(shift[i]));
  }
}

template <class T>
void norm_backward(T *dx, float *dshift, float *dscale, const T *g, const T *x, const T *scale, int64_t rows,
                   int64_t width, float eps) {
  for (int64_t r = 0; r < rows; r++, x += width, g += width, dx += width) {
    Moments m = moments(x, width, eps);
    float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t i = 0; i < width; i++) {
      float unit = (get(x[i]) - m.mean) * m.inverse, h = get(g[i]), d = h * (1.0f + get(scale[i]));
      dshift[i] += h;
      dscale[i] += h * unit;
      sum += d;
      product += d * unit;
    }
    sum /= float(width);
    product /= float(width);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      float unit = (get(x[i]) - m.mean) * m.inverse;
      dx[i] = put<T>((get(g[i]) * (1.0f + get(scale[i])) - sum - unit * product) * m.inverse);
    }
  }
}

template <class T>
void gate(T *out, const T *x, const T *gate, const T *y, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++, x += width, y += width, out += width)
#pragma omp simd
    for (int64_t i = 0; i < width; i++) out[i] = put<T>(get(x[i]) + get(gate[i]) * get(y[i]));
}

template <class T>
void gate_backward(T *dy, float *dgate, const T *g, const T *gate, const T *y, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++, g += width, y += width, dy += width)
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      float h = get(g[i]);
      dgate[i] += h * get(y[i]);
      dy[i] = put<T>(h * get(gate[i]));
    }
}

template <class T>
void gelu(T *out, int64_t out_stride, const T *x, int64_t x_stride, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++, x += x_stride, out += out_stride)
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      float v = get(x[i]);
      out[i] = put<T>(v * sigmoid(v));
    }
}

template <class T>
void gelu_backward(T *dx, int64_t dx_stride, const T *g, int64_t g_stride, const T *x, int64_t x_stride, int64_t rows,
                   int64_t width) {
  for (int64_t r = 0; r < rows; r++, x += x_stride, g += g_stride, dx += dx_stride)
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      float v = get(x[i]), s = sigmoid(v);
      float slope = s + v * s * (1.0f - s) * (2.0f * root * (1.0f + 3.0f * cubic * v * v));
      dx[i] = put<T>(get(g[i]) * slope);
    }
}

constexpr int64_t block = 64;
/* 1 / √(mean x² + eps) of at most `block` rows, roots and divisions together: one by one they would wait for each other. */
template <class T>
__attribute__((always_inline)) inline void inverses(float *out, const T *x, int64_t stride, HeadShape s, const float *gain,
                                                    float eps) {
  for (int64_t r = 0; r < s.rows; r++, x += stride) {
    __builtin_prefetch(x + 8 * stride);  // rows lie too far apart for the processor to see a pattern
    float squares = 0;
    if (gain) {
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < s.size; i++) squares += get(x[i]) * get(x[i]);
    }
    out[r] = squares;
  }
#pragma omp simd
  for (int64_t r = 0; r < s.rows; r++) out[r] = gain ? 1.0f / __builtin_sqrtf(out[r] / float(s.size) + eps) : 1.0f;
}

template <int64_t n>
struct Constant {
  constexpr operator int64_t() const { return n; }
};
/* Calls body(size) with the usual sizes of heads as constants, so that loops over them unroll. */
template <class F>
inline void sized(int64_t size, F &&body) {
  switch (size) {
    case 16: return body(Constant<16>());
    case 32: return body(Constant<32>());
    case 64: return body(Constant<64>());
    case 128: return body(Constant<128>());
    default: return body(size);
  }
}

template <class T>
void head(T *out, const T *x, int64_t stride, HeadShape s, const float *gain, const float *rotation, float eps) {
  sized(s.size, [=](auto size) mutable {
    float y[512], inverse[block];
    for (int64_t r = 0; r < s.rows; r++, x += stride, out += size) {
      if (r % block == 0) inverses(inverse, x, stride, {s.rows - r < block ? s.rows - r : block, size}, gain, eps);
      float factor = inverse[r % block];
#pragma omp simd
      for (int64_t i = 0; i < size; i++) y[i] = get(x[i]) * factor * (gain ? gain[i] : 1.0f);
      if (rotation) {
        const float *t = rotation + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size / 2; i++) {
          float a = y[2 * i], b = y[2 * i + 1], c = t[2 * i], d = t[2 * i + 1];
          y[2 * i] = a * c - b * d;
          y[2 * i + 1] = a * d + b * c;
        }
      }
#pragma omp simd
      for (int64_t i = 0; i < size; i++) out[i] = put<T>(y[i]);
    }
  });
}

template <class T>
void head_backward(T *dx, int64_t stride, float *dgain, const float *g, const T *x, int64_t x_stride, HeadShape s,
                   const float *gain, const float *rotation, float eps) {
  sized(s.size, [=](auto size) mutable {
    float h[512], inverses_[block];
    for (int64_t r = 0; r < s.rows; r++, x += x_stride, g += size, dx += stride) {
      if (r % block == 0) inverses(inverses_, x, x_stride, {s.rows - r < block ? s.rows - r : block, size}, gain, eps);
#pragma omp simd
      for (int64_t i = 0; i < size; i++) h[i] = g[i];
      if (rotation) {
        const float *t = rotation + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size / 2; i++) {
          float a = h[2 * i], b = h[2 * i + 1], c = t[2 * i], d = t[2 * i + 1];
          h[2 * i] = a * c + b * d;
          h[2 * i + 1] = b * c - a * d;
        }
      }
      float inverse = inverses_[r % block], product = 0;
      if (gain) {
        if (dgain) {
#pragma omp simd
          for (int64_t i = 0; i < size; i++) dgain[i] += h[i] * get(x[i]) * inverse;
        }
#pragma omp simd reduction(+ : product)
        for (int64_t i = 0; i < size; i++) {
          h[i] *= gain[i];
          product += h[i] * get(x[i]);
        }
        product *= inverse * inverse / float(size);
      }
#pragma omp simd
      for (int64_t i = 0; i < size; i++) dx[i] = put<T>((h[i] - get(x[i]) * product) * inverse);
    }
  });
}

constexpr float nothing = -1e30f;  // of a score: its exponential is 0

template <class T>
void softmax(T *p, float *largest, float *inverse, float *scores, HeadShape s, int64_t padded, float factor) {
  for (int64_t r = 0; r < s.rows; r++, scores += padded, p += padded) {
    for (int64_t i = s.size; i < padded; i++) scores[i] = nothing;
    float most = nothing, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < padded; i++) most = scores[i] > most ? scores[i] : most;
    most *= factor;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < padded; i++) {
      float e = exponential(scores[i] * factor - most);
      sum += e;
      p[i] = put<T>(e);
    }
    largest[r] = most;
    inverse[r] = 1.0f / sum;
  }
}

template <class T>
void softmax_backward(T *p, T *ds, float *scores, const float *dp, const float *largest, const float *inverse,
                      const float *delta, HeadShape s, int64_t padded, float factor) {
  for (int64_t r = 0; r < s.rows; r++, scores += padded, dp += padded, p += padded, ds += padded) {
    for (int64_t i = s.size; i < padded; i++) scores[i] = nothing;
    float most = largest[r], unit = inverse[r], minus = delta[r];
#pragma omp simd
    for (int64_t i = 0; i < padded; i++) {
      float e = exponential(scores[i] * factor - most) * unit;
      p[i] = put<T>(e);
      ds[i] = put<T>(e * (dp[i] - minus) * factor);
    }
  }
}

template <class T>
void dot(float *out, const T *a, const T *b, int64_t b_stride, HeadShape s) {
  for (int64_t r = 0; r < s.rows; r++, a += s.size, b += b_stride) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < s.size; i++) sum += get(a[i]) * get(b[i]);
    out[r] = sum;
  }
}

template <class T>
void copy(T *out, int64_t out_stride, const T *x, int64_t x_stride, HeadShape s) {
  sized(s.size, [=](auto size) mutable {
    for (int64_t r = 0; r < s.rows; r++, x += x_stride, out += out_stride) {
      __builtin_prefetch(x + 8 * x_stride);
      __builtin_memcpy(out, x, size_t(size) * sizeof(T));
    }
  });
}

template <class T>
void scale(T *out, int64_t out_stride, const float *x, int64_t x_stride, const float *factor, HeadShape s) {
  for (int64_t r = 0; r < s.rows; r++, x += x_stride, out += out_stride) {
    float f = factor ? factor[r] : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < s.size; i++) out[i] = put<T>(x[i] * f);
  }
}

template <class T>
void bias(T *out, int64_t out_stride, const float *x, const float *bias, HeadShape s) {
  for (int64_t r = 0; r < s.rows; r++, x += s.size, out += out_stride)
#pragma omp simd
    for (int64_t i = 0; i < s.size; i++) out[i] = put<T>(x[i] + bias[i]);
}

template <class T>
void accumulate(T *out, int64_t out_stride, const float *x, const float *bias, HeadShape s) {
  for (int64_t r = 0; r < s.rows; r++, x += s.size, out += out_stride) {
    if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < s.size; i++) out[i] = put<T>(get(out[i]) + (x[i] + bias[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < s.size; i++) out[i] = put<T>(get(out[i]) + x[i]);
    }
  }
}

template <class T>
void transpose(T *out, int64_t padded, const T *x, HeadShape s) {
  for (int64_t c = 0; c < s.size; c++, out += padded) {
    for (int64_t r = 0; r < s.rows; r++) out[r] = x[r * s.size + c];
    for (int64_t r = s.rows; r < padded; r++) out[r] = 0;
  }
}

void transpose_float(float *out, const float *x, int64_t padded, HeadShape s) {
  for (int64_t r = 0; r < s.rows; r++, out += s.size)
#pragma omp simd
    for (int64_t c = 0; c < s.size; c++) out[c] = x[c * padded + r];
}

void pack(float *out, const float *x, int64_t stride, HeadShape s, int64_t padded) {
  for (int64_t r = 0; r < s.rows; r++) __builtin_memcpy(out + r * s.size, x + r * stride, size_t(s.size) * sizeof(float));
  __builtin_memset(out + s.rows * s.size, 0, size_t((padded - s.rows) * s.size) * sizeof(float));
}
void pack(Bits *out, const Bits *x, int64_t stride, HeadShape s, int64_t padded) {
  uint32_t *pairs = reinterpret_cast<uint32_t *>(out);
  for (int64_t r = 0; r < padded; r += 2, x += 2 * stride, pairs += s.size) {
    if (r + 1 < s.rows) {
#pragma omp simd
      for (int64_t c = 0; c < s.size; c++) pairs[c] = uint32_t(x[c]) | uint32_t(x[stride + c]) << 16;
    } else {
      for (int64_t c = 0; c < s.size; c++) pairs[c] = r < s.rows ? x[c] : 0;
    }
  }
}

void pack_transposed(float *out, const float *x, HeadShape s, int64_t padded) { transpose(out, padded, x, s); }
void pack_transposed(Bits *out, const Bits *x, HeadShape s, int64_t padded) {
  // A pair of neighbours in a row is one number here.
  transpose(reinterpret_cast<uint32_t *>(out), padded, reinterpret_cast<const uint32_t *>(x), {s.rows, s.size / 2});
}

template <class T>
void column_moments(float *__restrict mean, float *__restrict squares, const T *x, HeadShape s) {
  sized(s.size, [=](auto size) mutable {
    for (int64_t i = 0; i < size; i++) mean[i] = squares[i] = 0;
    for (int64_t r = 0; r < s.rows; r++)
#pragma omp simd
      for (int64_t i = 0; i < size; i++) mean[i] += get(x[r * size + i]);
    for (int64_t i = 0; i < size; i++) mean[i] /= float(s.rows);
    for (int64_t r = 0; r < s.rows; r++)
#pragma omp simd
      for (int64_t i = 0; i < size; i++) {
        float d = get(x[r * size + i]) - mean[i];
        squares[i] += d * d;
      }
  });
}

template <class T>
void affine_silu(T *__restrict out, const T *x, const float *__restrict factor, const float *__restrict addend,
                 HeadShape s) {
  sized(s.size, [=](auto size) mutable {
    for (int64_t r = 0; r < s.rows; r++, x += size, out += size)
#pragma omp simd
      for (int64_t i = 0; i < size; i++) {
        float v = get(x[i]) * factor[i] + addend[i];
        out[i] = put<T>(v / (1.0f + exponential(v > -87.0f ? -v : 87.0f)));
      }
  });
}

template <class T>
void add(T *out, int64_t out_stride, const float *x, int64_t x_stride, const T *addend, HeadShape s) {
  sized(s.size, [=](auto size) mutable {
    for (int64_t r = 0; r < s.rows; r++, x += x_stride, out += out_stride) {
      const T *y = addend ? addend + r * out_stride : nullptr;
#pragma omp simd
      for (int64_t i = 0; i < size; i++) out[i] = put<T>(y ? x[i] + get(y[i]) : x[i]);
    }
  });
}

void fill(float *out, const float *row, HeadShape s) {
  for (int64_t r = 0; r < s.rows; r++, out += s.size) __builtin_memcpy(out, row, size_t(s.size) * sizeof(float));
}

template <class T>
constexpr Kernels<T> table() {
  return {norm<T>,          norm_backward<T>, gate<T>,          gate_backward<T>,    gelu<T>, gelu_backward<T>, head<T>,
          head_backward<T>, softmax<T>,       softmax_backward<T>, dot<T>,              copy<T>, scale<T>,         bias<T>,
          accumulate<T>,    transpose<T>,     transpose_float,  pack,                pack_transposed,
          column_moments<T>, affine_silu<T>,  add<T>,           fill};
}

}  // namespace

#define JOIN(a, b) a##_##b
#define KERNELS(instructions, type) JOIN(instructions, type)

namespace chunkgrpo {
extern const Kernels<float> KERNELS(INSTRUCTIONS, float);
extern const Kernels<uint16_t> KERNELS(INSTRUCTIONS, bfloat16);
const Kernels<float> KERNELS(INSTRUCTIONS, float) = table<float>();
const Kernels<uint16_t> KERNELS(INSTRUCTIONS, bfloat16) = table<uint16_t>();
}  // namespace chunkgrpo
