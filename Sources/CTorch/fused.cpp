// See fused.h. Tasks depend on shapes alone, never on the number of threads: equal inputs give equal bits.
#include "fused.h"

#include "tasks.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <type_traits>

namespace chunkgrpo {

#if defined(__x86_64__)
#define TABLES(x) extern const Kernels<float> x##_float; extern const Kernels<uint16_t> x##_bfloat16;
TABLES(base)
TABLES(avx2)
TABLES(avx512)
template <class T>
const Kernels<T> &kernels() {
  static const int level = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")
                               ? 2
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1
                                                                                            : 0;
  if constexpr (std::is_same_v<T, float>)
    return level == 2 ? avx512_float : level == 1 ? avx2_float : base_float;
  else
    return level == 2 ? avx512_bfloat16 : level == 1 ? avx2_bfloat16 : base_bfloat16;
}
#else
extern const Kernels<float> base_float;
extern const Kernels<uint16_t> base_bfloat16;
template <class T>
const Kernels<T> &kernels() {
  if constexpr (std::is_same_v<T, float>)
    return base_float;
  else
    return base_bfloat16;
}
#endif

template const Kernels<float> &kernels<float>();
template const Kernels<uint16_t> &kernels<uint16_t>();

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/* [B, S, D] cut into tasks of whole rows: a sample each where there are many, else blocks of 32 rows. */
struct Rows {
  int64_t batch, tokens, width, block, blocks;
  explicit Rows(const Tensor &x) : batch(x.size(0)), tokens(x.size(1)), width(x.size(2)) {
    block = batch >= 16 ? tokens : std::min<int64_t>(tokens, 32);
    blocks = (tokens + block - 1) / block;
  }
  /* body(sample, first row of all, rows, task) */
  template <class F>
  void run(F &&body) const {
    at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const int64_t start = t % blocks * block;
        body(t / blocks, t / blocks * tokens + start, std::min(block, tokens - start), t);
      }
    });
  }
  Tensor sums(const Tensor &x) const { return at::zeros({batch, blocks, width}, x.options().dtype(at::kFloat)); }
};

/* [B, 1, D] whose last dimension is contiguous. */
Tensor vectors(const Tensor &t, const Tensor &x, const char *name) {
  TORCH_CHECK(t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == 1 && t.size(2) == x.size(2) &&
                  t.scalar_type() == x.scalar_type(),
              name, " ", t.scalar_type(), t.sizes(), " does not fit ", x.scalar_type(), x.sizes());
  return t.stride(2) == 1 ? t : t.contiguous();
}
void check(const Tensor &x) {
  TORCH_CHECK(x.dim() == 3 && fusible(x), "expected [B, S, D] in float32 or bfloat16 on the CPU, got ",
              x.scalar_type(), x.sizes());
}

struct ModulatedNorm : torch::autograd::Function<ModulatedNorm> {
  static Tensor forward(AutogradContext *ctx, const Tensor &input, const Tensor &shifts, const Tensor &scales, double eps) {
    check(input);
    Tensor x = input.contiguous(), shift = vectors(shifts, x, "shift"), scale = vectors(scales, x, "scale");
    Tensor out = at::empty_like(x);
    ctx->save_for_backward({x, scale});
    ctx->saved_data["eps"] = eps;
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      const Rows rows(x);
      rows.run([&](int64_t b, int64_t first, int64_t count, int64_t) {
        kernels<T>().norm(data<T>(out) + first * rows.width, data<T>(x) + first * rows.width,
                          data<T>(shift) + b * shift.stride(0), data<T>(scale) + b * scale.stride(0), count, rows.width,
                          float(eps));
      });
    });
    return out;
  }
  static variable_list backward(AutogradContext *ctx, const variable_list &gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &scale = saved[1];
    const Tensor g = gradients[0].contiguous();
    const float eps = float(ctx->saved_data["eps"].toDouble());
    Tensor dx = at::empty_like(x), dshift, dscale;
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      const Rows rows(x);
      dshift = rows.sums(x);
      dscale = rows.sums(x);
      rows.run([&](int64_t b, int64_t first, int64_t count, int64_t task) {
        const int64_t at = first * rows.width;
        kernels<T>().norm_backward(data<T>(dx) + at, data<float>(dshift) + task * rows.width,
                                   data<float>(dscale) + task * rows.width, data<T>(g) + at, data<T>(x) + at,
                                   data<T>(scale) + b * scale.stride(0), count, rows.width, eps);
      });
    });
    return {dx, dshift.sum(1, true).to(x.scalar_type()), dscale.sum(1, true).to(x.scalar_type()), Tensor()};
  }
};

struct GatedAdd : torch::autograd::Function<GatedAdd> {
  static Tensor forward(AutogradContext *ctx, const Tensor &input, const Tensor &gates, const Tensor &addend) {
    check(input);
    TORCH_CHECK(addend.sizes() == input.sizes() && addend.scalar_type() == input.scalar_type(), "y ",
                addend.scalar_type(), addend.sizes(), " does not fit ", input.scalar_type(), input.sizes());
    Tensor x = input.contiguous(), y = addend.contiguous(), gate = vectors(gates, x, "gate"), out = at::empty_like(x);
    ctx->save_for_backward({gate, y});
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      const Rows rows(x);
      rows.run([&](int64_t b, int64_t first, int64_t count, int64_t) {
        const int64_t at = first * rows.width;
        kernels<T>().gate(data<T>(out) + at, data<T>(x) + at, data<T>(gate) + b * gate.stride(0), data<T>(y) + at, count,
                          rows.width);
      });
    });
    return out;
  }
  static variable_list backward(AutogradContext *ctx, const variable_list &gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &gate = saved[0], &y = saved[1];
    const Tensor g = gradients[0].contiguous();
    Tensor dy = at::empty_like(y), dgate;
    dispatch(y, [&](auto zero) {
      using T = decltype(zero);
      const Rows rows(y);
      dgate = rows.sums(y);
      rows.run([&](int64_t b, int64_t first, int64_t count, int64_t task) {
        const int64_t at = first * rows.width;
        kernels<T>().gate_backward(data<T>(dy) + at, data<float>(dgate) + task * rows.width, data<T>(g) + at,
                                   data<T>(gate) + b * gate.stride(0), data<T>(y) + at, count, rows.width);
      });
    });
    return {gradients[0], dgate.sum(1, true).to(y.scalar_type()), dy};
  }
};

/* Attention of one or two streams of tokens over all of them, from their projections [B, Sᵢ, 3·H·D + tailᵢ]: queries and
   keys normalised and rotated on the way, what follows them in a row through a tanh-GELU. */
struct JointAttention : torch::autograd::Function<JointAttention> {
  struct Sizes {
    int64_t batch, heads, size, tokens = 0, padded;  // tokens, and rounded up to a multiple of 16
    double eps;
    float factor;
    std::vector<int64_t> counts, starts, tails;
    int64_t width() const { return heads * size; }
    Sizes(const variable_list &x, int64_t heads, int64_t size, double eps)
        : batch(x[0].size(0)), heads(heads), size(size), eps(eps), factor(float(1 / std::sqrt(double(size)))) {
      for (const auto &t : x) {
        counts.push_back(t.size(1));
        starts.push_back(tokens);
        tails.push_back(t.size(2) - 3 * width());
        tokens += t.size(1);
      }
      padded = (tokens + 15) / 16 * 16;
    }
  };
  template <class T>
  struct Streams {
    std::vector<T *> in, out;
    std::vector<const float *> gains;
    const float *rotation;
  };

  static variable_list forward(AutogradContext *ctx, at::TensorList projections, at::TensorList gains,
                               const Tensor &rotation, int64_t heads, int64_t size, double eps) {
    variable_list x, outputs, saved;
    for (const auto &t : projections) {
      check(t);
      x.push_back(t.contiguous());
    }
    const Sizes s(x, heads, size, eps);
    TORCH_CHECK(size % 2 == 0 && size <= 512, "heads of ", size, " numbers: expected an even number up to 512");
    TORCH_CHECK(rotation.numel() == 0 || (rotation.numel() == s.tokens * size && rotation.is_contiguous() &&
                                        rotation.scalar_type() == at::kFloat),
                "rotation ", rotation.sizes(), " does not fit ", s.tokens, " tokens with heads of ", size);
    TORCH_CHECK(gains.empty() || gains.size() == x.size(), "expected gains for every stream");
    variable_list norms;
    for (const auto &g : gains) {
      TORCH_CHECK(g.numel() == 2 * size, "gains ", g.sizes(), ": expected [2, ", size, "]");
      norms.push_back(g.to(at::kFloat).contiguous());
    }
    for (size_t i = 0; i < x.size(); i++) {
      TORCH_CHECK(s.tails[i] >= 0 && x[i].size(0) == s.batch && x[i].scalar_type() == x[0].scalar_type(), "projections ",
                  x[i].scalar_type(), x[i].sizes(), ": expected [", s.batch, ", S, ", 3 * s.width(), " or more]");
      outputs.push_back(at::empty({s.batch, s.counts[i], s.width() + s.tails[i]}, x[i].options()));
    }
    Tensor sums = at::empty({s.batch * heads, 2, s.tokens}, x[0].options().dtype(at::kFloat));
    dispatch(x[0], [&](auto zero) {
      using T = decltype(zero);
      run_forward<T>(s, streams<T>(x, outputs, norms, rotation), data<float>(sums));
    });
    saved = x;
    saved.insert(saved.end(), outputs.begin(), outputs.end());
    saved.insert(saved.end(), norms.begin(), norms.end());
    saved.push_back(rotation);
    saved.push_back(sums);
    ctx->save_for_backward(saved);
    ctx->saved_data["streams"] = int64_t(x.size());
    ctx->saved_data["gains"] = int64_t(norms.size());
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["size"] = size;
    ctx->saved_data["eps"] = eps;
    return outputs;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &gradients) {
    const auto saved = ctx->get_saved_variables();
    const size_t n = size_t(ctx->saved_data["streams"].toInt()), k = size_t(ctx->saved_data["gains"].toInt());
    const auto at = saved.begin();
    const variable_list x(at, at + n), outputs(at + n, at + 2 * n), norms(at + 2 * n, at + 2 * n + k);
    const Sizes s(x, ctx->saved_data["heads"].toInt(), ctx->saved_data["size"].toInt(), ctx->saved_data["eps"].toDouble());
    variable_list g, dx, dgains;
    for (size_t i = 0; i < n; i++) {
      g.push_back(gradients[i].contiguous());
      dx.push_back(at::empty_like(x[i]));
    }
    for (size_t i = 0; i < k; i++)
      if (ctx->needs_input_grad(n + i))
        dgains.push_back(at::zeros({s.batch * s.heads, 2, s.size}, norms[i].options()));
      else
        dgains.emplace_back();
    dispatch(x[0], [&](auto zero) {
      using T = decltype(zero);
      run_backward<T>(s, streams<T>(x, outputs, norms, saved[2 * n + k]), streams<T>(g, dx, {}, Tensor()), dgains,
                      data<float>(saved[2 * n + k + 1]));
    });
    variable_list result = dx;
    for (auto &d : dgains) result.push_back(d.defined() ? d.sum(0) : d);
    result.resize(n + k + 4);
    return result;
  }

  template <class T>
  static Streams<T> streams(const variable_list &in, const variable_list &out, const variable_list &gains,
                            const Tensor &rotation) {
    Streams<T> s;
    for (const auto &t : in) s.in.push_back(data<T>(t));
    for (const auto &t : out) s.out.push_back(data<T>(t));
    for (const auto &t : gains) s.gains.push_back(data<float>(t));
    s.rotation = rotation.defined() && rotation.numel() ? data<float>(rotation) : nullptr;
    return s;
  }

  /* Rotated queries and keys [tokens, size] and values, zero-padded by a row. */
  template <class T>
  static void gather(const Sizes &s, const Streams<T> &t, int64_t b, int64_t h, T *q, T *k, T *v) {
    const auto &kernel = kernels<T>();
    for (size_t i = 0; i < t.in.size(); i++) {
      const int64_t stride = 3 * s.width() + s.tails[i], row = s.starts[i] * s.size;
      const T *x = t.in[i] + b * s.counts[i] * stride + h * s.size;
      const float *gains = t.gains.empty() ? nullptr : t.gains[i], *rotation = t.rotation ? t.rotation + row : nullptr;
      const HeadShape shape{s.counts[i], s.size};
      kernel.head(q + row, x, stride, shape, gains, rotation, float(s.eps));
      kernel.head(k + row, x + s.width(), stride, shape, gains ? gains + s.size : nullptr, rotation, float(s.eps));
      kernel.copy(v + row, s.size, x + 2 * s.width(), stride, shape);
    }
  }

  /* Queries at once: their scores stay in the second-level cache up to some thousand tokens. */
  static constexpr int64_t query_block = 128;

  template <class T>
  static void run_forward(const Sizes &s, const Streams<T> &t, float *sums) {
    const auto &kernel = kernels<T>();
    const int64_t n = s.tokens, d = s.size, m = s.padded, most = std::min(query_block, n);
    const HeadShape head{n, d};
    at::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
      Arena arena(size_t(5 * m * d + most * m) * sizeof(T) + size_t(most * m + n * d) * sizeof(float) + 1024);
      T *q = arena.take<T>(n * d), *k = arena.take<T>(n * d), *v = arena.take<T>(n * d), *keys = arena.take<T>(m * d),
        *values = arena.take<T>(m * d), *p = arena.take<T>(most * m);
      float *scores = arena.take<float>(most * m), *mixed = arena.take<float>(n * d);
      for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / s.heads, h = task % s.heads;
        gather(s, t, b, h, q, k, v);
        kernel.pack_transposed(keys, k, head, m);
        kernel.pack(values, v, head.size, head, m);
        float *largest = sums + 2 * task * n, *inverse = largest + n;  // what backward needs of every row
        for (int64_t first = 0; first < n; first += query_block) {
          const int64_t rows = std::min(query_block, n - first);
          multiply(rows, m, d, q + first * d, d, keys, scores);
          kernel.softmax(p, largest + first, inverse + first, scores, {rows, n}, m, s.factor);
          multiply(rows, d, m, p, m, values, mixed + first * d);
        }
        for (size_t i = 0; i < t.in.size(); i++) {
          const int64_t stride = s.width() + s.tails[i];
          kernel.scale(t.out[i] + b * s.counts[i] * stride + h * d, stride, mixed + s.starts[i] * d, d,
                       inverse + s.starts[i], {s.counts[i], d});
        }
      }
      at::native::cpublas::brgemm_release(sizeof(T) == 2);
    });
    for_tails(s, [&](size_t i, int64_t first, int64_t rows) {
      const int64_t in = 3 * s.width() + s.tails[i], out = s.width() + s.tails[i];
      kernel.gelu(t.out[i] + first * out + s.width(), out, t.in[i] + first * in + 3 * s.width(), in, rows, s.tails[i]);
    });
  }

  /* t: projections and outputs; g: gradients of the outputs, and of the projections, which are written. */
  template <class T>
  static void run_backward(const Sizes &s, const Streams<T> &t, const Streams<T> &g, const variable_list &dgains,
                           const float *sums) {
    const auto &kernel = kernels<T>();
    const int64_t n = s.tokens, d = s.size, m = s.padded, most = std::min(query_block, n), even = (most + 15) / 16 * 16;
    const HeadShape head{n, d};
    at::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
      Arena arena(size_t(7 * m * d + d * even + 2 * most * m + even * m) * sizeof(T) +
                  size_t(2 * most * m + 5 * m * d + n) * sizeof(float) + 2048);
      T *q = arena.take<T>(n * d), *k = arena.take<T>(n * d), *v = arena.take<T>(n * d), *o = arena.take<T>(n * d);
      T *keys_turned = arena.take<T>(m * d), *values_turned = arena.take<T>(m * d), *keys = arena.take<T>(m * d);
      T *p = arena.take<T>(most * m), *ds = arena.take<T>(most * m);
      T *pairs = arena.take<T>(even * m), *turned = arena.take<T>(d * even);
      float *scores = arena.take<float>(most * m), *dp = arena.take<float>(most * m), *delta = arena.take<float>(n);
      float *dq = arena.take<float>(n * d), *dk = arena.take<float>(n * d), *dv = arena.take<float>(n * d);
      float *dk_turned = arena.take<float>(m * d), *dv_turned = arena.take<float>(m * d);
      for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / s.heads, h = task % s.heads;
        gather(s, t, b, h, q, k, v);
        for (size_t i = 0; i < t.in.size(); i++) {
          const int64_t stride = s.width() + s.tails[i], at = b * s.counts[i] * stride + h * d, row = s.starts[i];
          kernel.copy(o + row * d, d, g.in[i] + at, stride, {s.counts[i], d});
          kernel.dot(delta + row, o + row * d, t.out[i] + at, stride, {s.counts[i], d});
        }
        kernel.pack_transposed(keys_turned, k, head, m);
        kernel.pack_transposed(values_turned, v, head, m);
        kernel.pack(keys, k, head.size, head, m);
        const float *largest = sums + 2 * task * n;
        for (int64_t first = 0; first < n; first += query_block) {
          const int64_t rows = std::min(query_block, n - first), padded = (rows + 15) / 16 * 16;
          const HeadShape part{rows, d}, wide{rows, m};
          multiply(rows, m, d, q + first * d, d, keys_turned, scores);
          multiply(rows, m, d, o + first * d, d, values_turned, dp);
          kernel.softmax_backward(p, ds, scores, dp, largest + first, largest + n + first, delta + first, {rows, n}, m,
                                  s.factor);
          // Transposed products, so that only the narrow matrices are turned: dVᵀ += dOᵀ·P, dKᵀ += Qᵀ·dS.
          kernel.transpose(turned, padded, o + first * d, part);
          kernel.pack(pairs, p, wide.size, wide, padded);
          multiply(d, m, padded, turned, padded, pairs, m, dv_turned, m, first > 0);
          kernel.transpose(turned, padded, q + first * d, part);
          kernel.pack(pairs, ds, wide.size, wide, padded);
          multiply(d, m, padded, turned, padded, pairs, m, dk_turned, m, first > 0);
          multiply(rows, d, m, ds, m, keys, dq + first * d);
        }
        kernel.transpose_float(dv, dv_turned, m, head);
        kernel.transpose_float(dk, dk_turned, m, head);
        for (size_t i = 0; i < t.in.size(); i++) {
          const int64_t stride = 3 * s.width() + s.tails[i], at = b * s.counts[i] * stride + h * d, row = s.starts[i] * d;
          const float *gains = t.gains.empty() ? nullptr : t.gains[i], *turn = t.rotation ? t.rotation + row : nullptr;
          float *sums = !dgains.empty() && dgains[i].defined() ? data<float>(dgains[i]) + task * 2 * d : nullptr;
          const HeadShape shape{s.counts[i], d};
          const T *x = t.in[i] + at;
          T *dx = g.out[i] + at;
          kernel.head_backward(dx, stride, sums, dq + row, x, stride, shape, gains, turn, float(s.eps));
          kernel.head_backward(dx + s.width(), stride, sums ? sums + d : nullptr, dk + row, x + s.width(), stride, shape,
                               gains ? gains + d : nullptr, turn, float(s.eps));
          kernel.scale(dx + 2 * s.width(), stride, dv + row, d, nullptr, shape);
        }
      }
      at::native::cpublas::brgemm_release(sizeof(T) == 2);
    });
    for_tails(s, [&](size_t i, int64_t first, int64_t rows) {
      const int64_t in = 3 * s.width() + s.tails[i], out = s.width() + s.tails[i], at = first * in + 3 * s.width();
      kernel.gelu_backward(g.out[i] + at, in, g.in[i] + first * out + s.width(), out, t.in[i] + at, in, rows, s.tails[i]);
    });
  }

  template <class F>
  static void for_tails(const Sizes &s, F &&body) {
    constexpr int64_t block = 32;
    for (size_t i = 0; i < s.tails.size(); i++) {
      const int64_t rows = s.batch * s.counts[i];
      if (s.tails[i] == 0) continue;
      at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
        body(i, begin * block, std::min(end * block, rows) - begin * block);
      });
    }
  }
};

struct Gelu : torch::autograd::Function<Gelu> {
  template <class F>
  static void run(const Tensor &x, F &&body) {
    constexpr int64_t block = 1 << 14;
    at::parallel_for(0, (x.numel() + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      body(begin * block, std::min(end * block, x.numel()) - begin * block);
    });
  }
  static Tensor forward(AutogradContext *ctx, const Tensor &input) {
    Tensor x = input.contiguous(), out = at::empty_like(x);
    ctx->save_for_backward({x});
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      run(x, [&](int64_t at, int64_t count) { kernels<T>().gelu(data<T>(out) + at, 0, data<T>(x) + at, 0, 1, count); });
    });
    return out;
  }
  static variable_list backward(AutogradContext *ctx, const variable_list &gradients) {
    const Tensor x = ctx->get_saved_variables()[0], g = gradients[0].contiguous();
    Tensor dx = at::empty_like(x);
    dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      run(x, [&](int64_t at, int64_t count) {
        kernels<T>().gelu_backward(data<T>(dx) + at, 0, data<T>(g) + at, 0, data<T>(x) + at, 0, 1, count);
      });
    });
    return {dx};
  }
};

constexpr int64_t row_block = 64, column_block = 256;

/* [k, n] as the right operand of products by column blocks: pairs of rows interleaved. */
Tensor operand(const Tensor &m) {
  std::vector<Tensor> parts;
  const int64_t k = m.size(0), n = m.size(1);
  for (int64_t c = 0; c < n; c += column_block) {
    const int64_t width = std::min(column_block, n - c);
    parts.push_back(m.narrow(1, c, width).reshape({k / 2, 2, width}).transpose(1, 2).reshape({-1}));
  }
  return parts.size() == 1 ? parts[0].contiguous() : at::cat(parts);
}

/* out = a·m + bias for the operand of m [k, n]; `scratch` holds rows × column_block. */
void product(Bits *out, int64_t stride, const Bits *a, int64_t rows, int64_t k, const Bits *packed, int64_t n,
             const float *bias, float *scratch) {
  for (int64_t c = 0; c < n; c += column_block) {
    const int64_t width = std::min(column_block, n - c);
    multiply(rows, width, k, a, k, packed + c * k, scratch);
    if (bias)
      kernels<Bits>().bias(out + c, stride, scratch, bias + c, {rows, width});
    else
      kernels<Bits>().scale(out + c, stride, scratch, width, nullptr, {rows, width});
  }
}

/* A layer and its adapters, row block by row block: x·Wᵀ + b + (x·downᵀ)·upᵀ is one product of [x | x·downᵀ]. `leaves`
   are the adapters' factors in pairs or, without scales, weights and biases that are trained themselves (an empty tensor
   for no bias); `starts` their first rows. */
struct PackedProduct : torch::autograd::Function<PackedProduct> {
  static Tensor forward(AutogradContext *ctx, const Tensor &input, at::TensorList leaves, const PackedLinear &w,
                        const std::vector<double> &scales, const std::vector<int64_t> &starts) {
    auto shape = input.sizes().vec();
    const Tensor x = input.contiguous();
    const int64_t n = w.bias.numel(), k = shape.back(), rank = w.forward.numel() / n - k;
    TORCH_CHECK(x.scalar_type() == at::kBFloat16 && (w.forward.numel() % n) == 0 && rank >= 0, "x ", x.scalar_type(),
                shape, " does not fit a packed layer of ", n, " rows");
    const int64_t rows = x.numel() / k;
    shape.back() = n;
    Tensor out = at::empty(shape, x.options()), hidden = at::empty({rank == 0 ? 0 : rows, rank}, x.options());
    at::parallel_for(0, (rows + row_block - 1) / row_block, 1, [&](int64_t begin, int64_t end) {
      Arena arena(size_t(row_block * (k + rank)) * sizeof(Bits) + size_t(row_block * column_block) * sizeof(float) + 256);
      Bits *joined = arena.take<Bits>(row_block * (k + rank));
      float *scratch = arena.take<float>(row_block * column_block);
      for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * row_block, count = std::min(row_block, rows - first);
        const Bits *a = data<Bits>(x) + first * k;
        if (rank > 0) {
          Bits *h = data<Bits>(hidden) + first * rank;
          product(h, rank, a, count, k, data<Bits>(w.down), rank, nullptr, scratch);
          kernels<Bits>().copy(joined, k + rank, a, k, {count, k});
          kernels<Bits>().copy(joined + k, k + rank, h, rank, {count, rank});
          a = joined;
        }
        product(data<Bits>(out) + first * n, n, a, count, k + rank, data<Bits>(w.forward), n, data<float>(w.bias), scratch);
      }
      at::native::cpublas::brgemm_release();
    });
    variable_list saved{x, hidden, w.backward, w.up};
    saved.insert(saved.end(), leaves.begin(), leaves.end());
    if (rank == 0) saved[3] = Tensor();
    if (leaves.empty()) saved[0] = Tensor();  // the gradient of x needs the weights alone
    ctx->save_for_backward(saved);
    ctx->saved_data["scales"] = scales;
    ctx->saved_data["starts"] = starts;
    ctx->saved_data["sizes"] = std::vector<int64_t>{rows, k, n, rank};
    return out;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &gradients) {
    const auto saved = ctx->get_saved_variables();
    const auto sizes = ctx->saved_data["sizes"].toIntVector();
    const auto scales = ctx->saved_data["scales"].toDoubleVector();
    const auto starts = ctx->saved_data["starts"].toIntVector();
    const int64_t rows = sizes[0], k = sizes[1], n = sizes[2], rank = sizes[3];
    const Tensor g = gradients[0].contiguous();
    Tensor dx;
    if (ctx->needs_input_grad(0)) {
      auto shape = g.sizes().vec();
      shape.back() = k;
      dx = at::empty(shape, g.options());
    }
    // Sums over rows in at most eight parts, whatever the number of threads.
    const int64_t blocks = (rows + row_block - 1) / row_block, parts = std::min<int64_t>(blocks, 8);
    Tensor ddown = at::zeros({parts, rank, k}, g.options().dtype(at::kFloat));
    Tensor dup = at::zeros({parts, rank, n}, g.options().dtype(at::kFloat));
    at::parallel_for(0, rank > 0 ? parts : blocks, 1, [&](int64_t begin, int64_t end) {
      Arena arena(size_t(row_block * (n + rank + std::max(k, n) + 2 * rank)) * sizeof(Bits) +
                  size_t(row_block * column_block) * sizeof(float) + 512);
      Bits *joined = arena.take<Bits>(row_block * (n + rank)), *pairs = arena.take<Bits>(row_block * std::max(k, n)),
           *turned = arena.take<Bits>(row_block * rank), *inner = arena.take<Bits>(row_block * rank);
      float *scratch = arena.take<float>(row_block * column_block);
      const auto &kernel = kernels<Bits>();
      auto run = [&](int64_t block, float *ddown, float *dup) {
        const int64_t first = block * row_block, count = std::min(row_block, rows - first);
        const Bits *a = data<Bits>(g) + first * n;
        if (rank > 0) {
          product(inner, rank, a, count, n, data<Bits>(saved[3]), rank, nullptr, scratch);
          // down: innerᵀ·x; up: hiddenᵀ·g, of each layer its own rows and columns.
          kernel.transpose(turned, row_block, inner, {count, rank});
          kernel.pack(pairs, data<Bits>(saved[0]) + first * k, k, {count, k}, row_block);
          multiply(rank, k, row_block, turned, row_block, pairs, k, ddown, k, true);
          kernel.transpose(turned, row_block, data<Bits>(saved[1]) + first * rank, {count, rank});
          kernel.pack(pairs, a, n, {count, n}, row_block);
          int64_t row = 0;
          for (size_t i = 0; i < scales.size(); i++) {
            const int64_t r = saved[4 + 2 * i].size(0), width = saved[5 + 2 * i].size(0);
            multiply(r, width, row_block, turned + row * row_block, row_block, pairs + 2 * starts[i], n,
                     dup + row * n + starts[i], n, true);
            row += r;
          }
        }
        if (!dx.defined()) return;
        if (rank > 0) {
          kernel.copy(joined, n + rank, a, n, {count, n});
          kernel.copy(joined + n, n + rank, inner, rank, {count, rank});
          a = joined;
        }
        product(data<Bits>(dx) + first * k, k, a, count, n + rank, data<Bits>(saved[2]), k, nullptr, scratch);
      };
      for (int64_t t = begin; t < end; t++) {
        if (rank == 0) {
          run(t, nullptr, nullptr);
          continue;
        }
        for (int64_t block = blocks * t / parts; block < blocks * (t + 1) / parts; block++)
          run(block, data<float>(ddown) + t * rank * k, data<float>(dup) + t * rank * n);
      }
      at::native::cpublas::brgemm_release();
    });
    variable_list result{dx};
    if (scales.empty() && saved.size() > 4) {  // weights and biases that are trained themselves
      const Tensor dweight = g.view({rows, n}).t().mm(saved[0].view({rows, k})), dbias = g.view({rows, n}).sum(0, false, at::kFloat);
      for (size_t i = 0; i < starts.size(); i++) {
        const Tensor &weight = saved[4 + 2 * i], &bias = saved[5 + 2 * i];
        result.push_back(dweight.narrow(0, starts[i], weight.size(0)).to(weight.scalar_type()));
        result.push_back(bias.numel() ? dbias.narrow(0, starts[i], bias.size(0)).to(bias.scalar_type()) : Tensor());
      }
      result.resize(result.size() + 3);
      return result;
    }
    ddown = ddown.sum(0);
    dup = dup.sum(0);
    int64_t row = 0;
    for (size_t i = 0; i < scales.size(); i++) {
      const int64_t r = saved[4 + 2 * i].size(0);
      result.push_back(ddown.narrow(0, row, r));
      result.push_back(dup.narrow(0, row, r).narrow(1, starts[i], saved[5 + 2 * i].size(0)).t().contiguous().mul_(scales[i]));
      row += r;
    }
    result.resize(result.size() + 3);
    return result;
  }
};

/* out += a·m + bias, where there is one, for a [rows, r] with few columns and the operand of m [r, n]: one pass over out. */
void add_product(Tensor &out, const Tensor &a, const Tensor &packed, const std::optional<Tensor> &bias) {
  const int64_t rows = out.size(0), n = out.size(1), r = a.size(1);
  const Tensor floats = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  at::parallel_for(0, (rows + row_block - 1) / row_block, 1, [&](int64_t begin, int64_t end) {
    Arena arena(size_t(row_block * column_block) * sizeof(float));
    float *scratch = arena.take<float>(row_block * column_block);
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * row_block, count = std::min(row_block, rows - first);
      for (int64_t c = 0; c < n; c += column_block) {
        const int64_t width = std::min(column_block, n - c);
        multiply(count, width, r, data<Bits>(a) + first * r, r, data<Bits>(packed) + c * r, scratch);
        kernels<Bits>().accumulate(data<Bits>(out) + first * n + c, n, scratch, bias ? data<float>(floats) + c : nullptr,
                                   {count, width});
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

/* aᵀ·b [r, n] in float32 for a [rows, r] with few columns, b [rows, n] with contiguous rows: one pass over b. */
Tensor product_over_rows(const Tensor &a, const Tensor &b) {
  constexpr int64_t height = 256, width = 512;
  const int64_t rows = a.size(0), r = a.size(1), n = b.size(1), padded = (rows + 31) / 32 * 32;
  Tensor turned = at::zeros({r, padded}, a.options()), out = at::empty({r, n}, a.options().dtype(at::kFloat));
  turned.narrow(1, 0, rows).copy_(a.t());
  at::parallel_for(0, (n + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    Arena arena(size_t(height * width) * sizeof(Bits));
    Bits *pairs = arena.take<Bits>(height * width);
    for (int64_t c = begin * width; c < std::min(end * width, n); c += width) {
      const int64_t columns = std::min(width, n - c);
      for (int64_t first = 0; first < padded; first += height) {
        const int64_t depth = std::min(height, padded - first);
        kernels<Bits>().pack(pairs, data<Bits>(b) + first * b.stride(0) + c, b.stride(0),
                             {std::min(depth, rows - first), columns}, depth);
        multiply(r, columns, depth, data<Bits>(turned) + first, padded, pairs, columns, data<float>(out) + c, n, first > 0);
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return out;
}

/* x·Wᵀ + b for at most 64 rows of x: every weight is read once, as it lies. */
Tensor product_of_few(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias) {
  const int64_t rows = x.size(0), k = x.size(1), n = weight.size(0), padded = (rows + 15) / 16 * 16;
  const Tensor floats = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  Tensor out = at::empty({rows, n}, x.options()), turned = at::empty({k, padded}, x.options());
  kernels<Bits>().pack_transposed(data<Bits>(turned), data<Bits>(x), {rows, k}, padded);
  at::parallel_for(0, (n + row_block - 1) / row_block, 4, [&](int64_t begin, int64_t end) {
    Arena arena(2 * size_t(row_block * padded) * sizeof(float) + 64);
    float *block = arena.take<float>(row_block * padded), *lines = arena.take<float>(row_block * padded);
    for (int64_t first = begin * row_block; first < std::min(end * row_block, n); first += row_block) {
      const int64_t count = std::min(row_block, n - first);
      multiply(count, padded, k, data<Bits>(weight) + first * k, k, data<Bits>(turned), block);
      kernels<Bits>().transpose_float(lines, block, padded, {rows, count});
      if (bias)
        kernels<Bits>().bias(data<Bits>(out) + first, n, lines, data<float>(floats) + first, {rows, count});
      else
        kernels<Bits>().scale(data<Bits>(out) + first, n, lines, count, nullptr, {rows, count});
    }
    at::native::cpublas::brgemm_release();
  });
  return out;
}

/* Layers too wide to be laid out anew, and those of other devices and types: the base by libtorch, the adapters beside it. */
struct AdaptedLinear : torch::autograd::Function<AdaptedLinear> {
  /* Whether the adapters' products, with one side of a few columns, are made by brgemm. */
  static bool narrow(const Tensor &x, const Tensor &weight, const Tensor &down) {
    return x.device().is_cpu() && x.scalar_type() == at::kBFloat16 && attention_fusible(at::kBFloat16) &&
           down.size(0) % 2 == 0 && weight.size(0) % 2 == 0 && weight.size(1) % 2 == 0;
  }

  static Tensor forward(AutogradContext *ctx, const Tensor &x, at::TensorList leaves, const Tensor &weight,
                        const std::optional<Tensor> &bias, const Tensor &down, const Tensor &up,
                        const std::vector<double> &scales, const std::vector<int64_t> &starts) {
    auto shape = x.sizes().vec();
    const Tensor rows = x.reshape({-1, shape.back()}), hidden = rows.mm(down.t());
    Tensor out;
    if (narrow(x, weight, down)) {
      const bool few = rows.size(0) <= row_block && weight.is_contiguous();
      out = few ? product_of_few(rows.contiguous(), weight, bias) : at::linear(rows, weight);
      add_product(out, hidden, operand(up.t()), few ? std::nullopt : bias);
    } else {
      out = at::linear(rows, weight, bias);
      out.addmm_(hidden, up.t());
    }
    variable_list saved{rows, hidden, weight, down, up};
    saved.insert(saved.end(), leaves.begin(), leaves.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["scales"] = scales;
    ctx->saved_data["starts"] = starts;
    shape.back() = out.size(1);
    return out.view(shape);
  }
  static variable_list backward(AutogradContext *ctx, const variable_list &gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &hidden = saved[1], &weight = saved[2], &down = saved[3], &up = saved[4];
    const auto scales = ctx->saved_data["scales"].toDoubleVector();
    const auto starts = ctx->saved_data["starts"].toIntVector();
    const Tensor g = gradients[0].reshape({-1, weight.size(0)}).contiguous(), inner = g.mm(up);
    const bool thin = narrow(x, weight, down);
    auto over_rows = [thin](const Tensor &a, const Tensor &b) { return thin ? product_over_rows(a, b) : a.t().mm(b); };
    variable_list result(1);
    if (ctx->needs_input_grad(0)) {
      const bool few = thin && g.size(0) <= row_block && weight.stride(1) == 1;
      Tensor dx = few ? product_over_rows(g.t(), weight).to(g.scalar_type()) : g.mm(weight);
      if (thin)
        add_product(dx, inner, operand(down), std::nullopt);
      else
        dx.addmm_(inner, down);
      auto shape = gradients[0].sizes().vec();
      shape.back() = weight.size(1);
      result[0] = dx.view(shape);
    }
    const Tensor ddown = over_rows(inner, x.contiguous());
    int64_t row = 0;
    for (size_t i = 0; i < scales.size(); i++) {
      const Tensor &a = saved[5 + 2 * i], &b = saved[6 + 2 * i];
      const int64_t rank = a.size(0);
      result.push_back(ddown.narrow(0, row, rank).to(a.scalar_type()));
      // Of this layer's own rows and columns: the product of the others is not part of the sum.
      const Tensor dup = over_rows(hidden.narrow(1, row, rank), g.narrow(1, starts[i], b.size(0))).t().to(b.scalar_type());
      result.push_back((scales[i] == 1 ? dup : dup * scales[i]).contiguous());
      row += rank;
    }
    result.resize(result.size() + 6);
    return result;
  }
};

}  // namespace

bool fusible(const Tensor &x) {
  return x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

bool attention_fusible(at::ScalarType type) {
  // brgemm throws where oneDNN has no kernel for the processor.
  auto works = [](auto zero) {
    using T = decltype(zero);
    std::vector<T> a(32 * 32), b(32 * 32);
    std::vector<float> c(32 * 32);
    try {
      multiply(32, 32, 32, a.data(), 32, b.data(), c.data());
      at::native::cpublas::brgemm_release(sizeof(T) == 2);
      return true;
    } catch (const std::exception &) {
      return false;
    }
  };
  static const bool floats = works(float()), halves = works(Bits());
  return type == at::kFloat ? floats : type == at::kBFloat16 && halves;
}

Tensor modulated_norm(const Tensor &x, const Tensor &shift, const Tensor &scale, double eps) {
  return ModulatedNorm::apply(x, shift, scale, eps);
}
Tensor tanh_gelu(const Tensor &x) {
  TORCH_CHECK(fusible(x), "expected float32 or bfloat16 on the CPU, got ", x.scalar_type());
  return Gelu::apply(x);
}
Tensor gated_add(const Tensor &x, const Tensor &gate, const Tensor &y) { return GatedAdd::apply(x, gate, y); }
std::vector<Tensor> joint_attention(const std::vector<Tensor> &projections, const std::vector<Tensor> &gains,
                                    const Tensor &rotation, int64_t heads, int64_t size, double eps) {
  // An undefined tensor has no device, which apply() asks for.
  return JointAttention::apply(at::TensorList(projections), at::TensorList(gains),
                               rotation.defined() ? rotation : at::empty({0}), heads, size, eps);
}
namespace {
/* The adapters' tensors as inputs of a node, and what else they are. */
struct Leaves {
  std::vector<Tensor> tensors;
  std::vector<double> scales;
  std::vector<int64_t> starts;
  explicit Leaves(const std::vector<Adapter> &adapters) {
    for (const auto &a : adapters) {
      tensors.push_back(a.down);
      tensors.push_back(a.up);
      scales.push_back(a.scale);
      starts.push_back(a.start);
    }
  }
};
}  // namespace

Tensor packed_linear(const Tensor &x, const PackedLinear &packed, const std::vector<Tensor> &weights,
                     const std::vector<int64_t> &starts) {
  return PackedProduct::apply(x, at::TensorList(weights), packed, std::vector<double>(), starts);
}
PackedLinear pack_linear(const Tensor &weight, const std::optional<Tensor> &bias, const Tensor &down, const Tensor &up) {
  at::NoGradGuard no_grad;
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.size(0) % 2 == 0 && weight.size(1) % 2 == 0,
              "expected a bfloat16 matrix of even sizes, got ", weight.scalar_type(), weight.sizes());
  PackedLinear packed;
  packed.bias = bias ? bias->to(at::kFloat) : at::zeros({weight.size(0)}, weight.options().dtype(at::kFloat));
  if (!down.defined()) {
    packed.forward = operand(weight.t());
    packed.backward = operand(weight);
    return packed;
  }
  TORCH_CHECK(down.size(0) % 2 == 0, "expected adapters of an even rank in all, got ", down.size(0));
  packed.forward = operand(at::cat({weight.t(), up.t()}));
  packed.backward = operand(at::cat({weight, down}));
  packed.down = operand(down.t());
  packed.up = operand(up);
  return packed;
}
Tensor packed_linear(const Tensor &x, const PackedLinear &packed, const std::vector<Adapter> &adapters) {
  const Leaves leaves(adapters);
  return PackedProduct::apply(x, at::TensorList(leaves.tensors), packed, leaves.scales, leaves.starts);
}
Tensor adapted_linear(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias, const Tensor &packed_down,
                      const Tensor &packed_up, const std::vector<Adapter> &adapters) {
  const Leaves leaves(adapters);
  TORCH_CHECK(!weight.requires_grad() && !(bias && bias->requires_grad()), "the base of an adapted layer is frozen");
  return AdaptedLinear::apply(x, at::TensorList(leaves.tensors), weight, bias, packed_down, packed_up, leaves.scales,
                              leaves.starts);
}

}  // namespace chunkgrpo
