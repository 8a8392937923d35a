// See convolution.h. An image, channels last and with a border of zeros, is a matrix whose row p holds pixel p: neighbours in
// a row of pixels are one longer row of that matrix, so that a 3 × 3 convolution is three products of rows that overlap.
// Bands and blocks depend on an image's shape alone: neither threads nor neighbours in a batch change a bit.
#include "convolution.h"

#include "fused.h"
#include "tasks.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <vector>

namespace chunkgrpo {

namespace {

using at::Tensor;

constexpr int64_t column_block = 64;
/* Sums of a block of pixels, which should stay in the first-level cache; pixels of a band, in the second. */
constexpr int64_t block_numbers = 8192, band_bytes = 1 << 17;

/* What a convolution reads and writes, from the shapes. */
struct Shape {
  int64_t batch, height, width, in, out;  // of the input image; channels
  int64_t phases, taps, k, padded;        // of the packed weight
  int64_t border, pitch;                  // around the image; pixels of a row with it
  int64_t rows, bands;                    // of a band
  Shape(const Tensor &x, const Tensor &packed, int64_t channels)
      : batch(x.size(0)), height(x.size(2)), width(x.size(3)), in(x.size(1)), out(channels), phases(packed.size(0)),
        taps(packed.size(1)), k(packed.size(2)), padded(packed.size(3)) {
    border = taps > 1;
    pitch = width + 2 * border;
    const int64_t most = std::max<int64_t>(4, band_bytes / (pitch * in * x.element_size()) - 2 * border);
    bands = (height + most - 1) / most;
    rows = (height + bands - 1) / bands;
    bands = (height + rows - 1) / rows;
  }
  int64_t sides() const { return phases == 4 ? 2 : 1; }
  /* First number of a tap's rows in the padded band. */
  int64_t offset(int64_t phase, int64_t tap) const { return ((phase / 2 + tap) * pitch + phase % 2) * in; }
};

template <class T>
struct Convolution {
  const Shape s;
  const Tensor x, packed, bias, out, addend;  // undefined: nothing is added
  Tensor factors, addends;  // [batch, in] of the norm, undefined without one

  int64_t first(int64_t band) const { return band * s.rows; }
  int64_t count(int64_t band) const { return std::min(s.rows, s.height - first(band)); }
  const T *pixels(int64_t image, int64_t row) const { return data<T>(x) + (image * s.height + row) * s.width * s.in; }

  /* The rows of a band with its border, normalised. */
  void load(T *padded, int64_t image, int64_t band) const {
    const int64_t low = first(band) - s.border, line = s.pitch * s.in;
    for (int64_t r = 0; r < count(band) + 2 * s.border; r++, padded += line) {
      if (low + r < 0 || low + r >= s.height) {
        std::fill_n(padded, line, T(0));
        continue;
      }
      std::fill_n(padded, s.border * s.in, T(0));
      T *target = padded + s.border * s.in;
      if (factors.defined())
        kernels<T>().affine_silu(target, pixels(image, low + r), data<float>(factors) + image * s.in,
                                 data<float>(addends) + image * s.in, {s.width, s.in});
      else
        std::copy_n(pixels(image, low + r), s.width * s.in, target);
      std::fill_n(target + s.width * s.in, s.border * s.in, T(0));
    }
  }

  /* Sums of padded pixels from `p` on to where they belong: those of the border are dropped. */
  void store(const float *sums, int64_t p, int64_t pixels, int64_t image, int64_t band, int64_t phase, int64_t column,
             int64_t columns) const {
    const int64_t sides = s.sides(), live = std::min(columns, s.out - column);
    for (int64_t q = p; q < p + pixels;) {
      const int64_t row = q / s.pitch, col = q % s.pitch, length = std::min(p + pixels - q, s.width - col);
      if (length > 0) {
        const int64_t y = (first(band) + row) * sides + phase / 2, left = col * sides + phase % 2;
        const int64_t at = ((image * s.height * sides + y) * s.width * sides + left) * s.out + column;
        kernels<T>().add(data<T>(out) + at, sides * s.out, sums + (q - p) * columns, columns,
                         addend.defined() ? data<T>(addend) + at : nullptr, {length, live});
      }
      q = (row + 1) * s.pitch;
    }
  }

  void multiply_band(int64_t image, int64_t band, T *padded, float *sums) const {
    const bool direct = !s.border && !factors.defined();
    if (!direct) load(padded, image, band);
    const T *source = direct ? pixels(image, first(band)) : padded;
    const int64_t total = count(band) * s.pitch - 2 * s.border;
    for (int64_t phase = 0; phase < s.phases; phase++)
      for (int64_t column = 0; column < s.padded; column += column_block) {
        const int64_t columns = std::min(column_block, s.padded - column), block = block_numbers / columns;
        for (int64_t p = 0; p < total; p += block) {
          const int64_t pixels = std::min(block, total - p);
          // Sums start from the bias: every product is then of one kind, which the processor is set up for once.
          kernels<T>().fill(sums, data<float>(bias) + column, {pixels, columns});
          for (int64_t tap = 0; tap < s.taps; tap++) {
            const T *panel = data<T>(packed) + ((phase * s.taps + tap) * s.padded + column) * s.k;
            multiply(pixels, columns, s.k, source + s.offset(phase, tap) + p * s.in, s.in, panel, columns, sums, columns, true);
          }
          store(sums, p, pixels, image, band, phase, column, columns);
        }
      }
  }

  /* Runs over all bands: whole images where there are enough of them, so that they stay in a core's cache. */
  void run(const NormSilu &norm) {
    const auto options = x.options().dtype(at::kFloat);
    Tensor moments;
    if (norm.groups > 0) {
      moments = at::empty({s.batch, s.bands, 2, s.in}, options);
      factors = at::empty({s.batch, s.in}, options);
      addends = at::empty({s.batch, s.in}, options);
    }
    const Tensor ones = at::ones({s.in}, options), zeros = at::zeros({s.in}, options);
    const Tensor gain = norm.gain ? norm.gain->to(at::kFloat).contiguous() : ones;
    const Tensor offset = norm.offset ? norm.offset->to(at::kFloat).contiguous() : zeros;
    auto measure = [&](int64_t image, int64_t band) {
      float *m = data<float>(moments) + (image * s.bands + band) * 2 * s.in;
      kernels<T>().moments(m, m + s.in, pixels(image, first(band)), {count(band) * s.width, s.in});
    };
    auto combine = [&](int64_t image) {
      const float *m = data<float>(moments) + image * s.bands * 2 * s.in;
      const int64_t members = s.in / norm.groups;
      for (int64_t g = 0; g < norm.groups; g++) {
        auto over = [&](auto &&body) {
          double sum = 0;
          for (int64_t band = 0; band < s.bands; band++)
            for (int64_t c = g * members; c < (g + 1) * members; c++)
              sum += body(double(m[band * 2 * s.in + c]), double(m[(band * 2 + 1) * s.in + c]), double(count(band) * s.width));
          return sum / double(s.height * s.width * members);
        };
        const double mean = over([](double mean, double, double n) { return mean * n; });
        const double variance = over([&](double m, double squares, double n) { return squares + n * (m - mean) * (m - mean); });
        const double inverse = 1 / std::sqrt(variance + norm.eps);
        for (int64_t c = g * members; c < (g + 1) * members; c++) {
          const double factor = inverse * double(data<float>(gain)[c]);
          data<float>(factors)[image * s.in + c] = float(factor);
          data<float>(addends)[image * s.in + c] = float(double(data<float>(offset)[c]) - mean * factor);
        }
      }
    };
    auto bands = [&](auto &&body) {
      at::parallel_for(0, s.batch * s.bands, 1, [&](int64_t begin, int64_t end) { body(begin, end); });
    };
    auto multiplied = [&](int64_t begin, int64_t end, bool measured) {
      Arena arena(size_t((s.rows + 2 * s.border) * s.pitch * s.in) * sizeof(T) + (block_numbers + 64) * sizeof(float));
      T *padded = arena.take<T>((s.rows + 2 * s.border) * s.pitch * s.in);
      float *sums = arena.take<float>(block_numbers);
      for (int64_t t = begin; t < end; t++) {
        const int64_t image = t / s.bands, band = t % s.bands;
        if (!measured && band == 0) {
          for (int64_t b = 0; b < s.bands; b++) measure(image, b);
          combine(image);
        }
        multiply_band(image, band, padded, sums);
      }
      at::native::cpublas::brgemm_release(sizeof(T) == 2);
    };
    if (s.batch >= at::get_num_threads()) {
      at::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
        multiplied(begin * s.bands, end * s.bands, norm.groups == 0);
      });
      return;
    }
    if (norm.groups > 0) {
      bands([&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) measure(t / s.bands, t % s.bands);
      });
      for (int64_t image = 0; image < s.batch; image++) combine(image);
    }
    bands([&](int64_t begin, int64_t end) { multiplied(begin, end, true); });
  }
};

}  // namespace

Tensor pack_convolution(const Tensor &weight, bool doubled) {
  at::NoGradGuard no_grad;
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) && (weight.size(2) == 3 || (weight.size(2) == 1 && !doubled)) &&
                  weight.size(1) % 2 == 0 && fusible(weight),
              "expected [O, C, k, k] with even C and k 3 (or 1, not doubled) in float32 or bfloat16 on the CPU, got ",
              weight.scalar_type(), weight.sizes());
  Tensor w = weight.to(at::kFloat).permute({2, 3, 1, 0}).unsqueeze(0);  // [phases, rows, columns, C, O]
  if (doubled) {
    // Of a pixel of four, two of three rows and of three columns read the same pixel: their weights add up.
    const Tensor first = w.select(0, 0);
    auto pairs = [](const Tensor &t, int64_t dim, int64_t phase) {
      const int64_t cut = 1 + phase;
      return at::cat({t.narrow(dim, 0, cut).sum(dim, true), t.narrow(dim, cut, 3 - cut).sum(dim, true)}, dim);
    };
    std::vector<Tensor> phases;
    for (int64_t phase = 0; phase < 4; phase++) phases.push_back(pairs(pairs(first, 0, phase / 2), 1, phase % 2));
    w = at::stack(phases);
  }
  const int64_t out = weight.size(0), padded = (out + 15) / 16 * 16, k = w.size(2) * w.size(3);
  w = at::constant_pad_nd(w, {0, padded - out}).reshape({w.size(0), w.size(1), k, padded}).to(weight.scalar_type());
  std::vector<Tensor> blocks;
  for (int64_t c = 0; c < padded; c += column_block) {
    Tensor block = w.narrow(3, c, std::min(column_block, padded - c));
    if (weight.scalar_type() == at::kBFloat16)  // pairs of rows interleaved, as brgemm wants them
      block = block.reshape({w.size(0), w.size(1), k / 2, 2, -1}).transpose(3, 4);
    blocks.push_back(block.reshape({w.size(0), w.size(1), -1}));
  }
  return at::cat(blocks, 2).view(w.sizes()).contiguous();
}

Tensor convolution(const Tensor &input, const Tensor &packed, const std::optional<Tensor> &bias, int64_t channels,
                   const NormSilu &norm, const std::optional<Tensor> &addend) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !(input.requires_grad() || (addend && addend->requires_grad())),
              "this convolution has no gradient");
  TORCH_CHECK(input.dim() == 4 && fusible(input) && input.scalar_type() == packed.scalar_type(),
              "expected [B, C, H, W] in ", packed.scalar_type(), " on the CPU, got ", input.scalar_type(), input.sizes());
  const Shape s(input, packed, channels);
  const int64_t width = packed.size(0) == 4 ? 2 : packed.size(1);
  TORCH_CHECK(s.k == width * s.in && s.out > s.padded - 16 && s.out <= s.padded, "weights for ", s.k / width,
              " channels do not fit ", input.sizes());
  TORCH_CHECK(norm.groups == 0 || s.in % norm.groups == 0, norm.groups, " groups do not fit ", input.sizes());
  for (const auto &t : {norm.gain, norm.offset}) TORCH_CHECK(!t || t->numel() == s.in, "gain or offset does not fit ", input.sizes());
  TORCH_CHECK(!bias || bias->numel() == s.out, "bias does not fit ", s.out, " channels");
  at::NoGradGuard no_grad;
  const auto layout = at::MemoryFormat::ChannelsLast;
  const Tensor x = input.contiguous(layout);
  Tensor out = at::empty({s.batch, s.out, s.height * s.sides(), s.width * s.sides()}, x.options(), layout);
  TORCH_CHECK(!addend || (addend->sizes() == out.sizes() && addend->scalar_type() == x.scalar_type()), "cannot add to ",
              out.sizes());
  const auto floats = x.options().dtype(at::kFloat);
  Tensor sums = bias ? at::constant_pad_nd(bias->to(at::kFloat), {0, s.padded - s.out}) : at::zeros({s.padded}, floats);
  const Tensor rest = addend ? addend->contiguous(layout) : Tensor();
  dispatch(x, [&](auto zero) {
    Convolution<decltype(zero)>{s, x, packed, sums.contiguous(), out, rest, Tensor(), Tensor()}.run(norm);
  });
  return out;
}

}  // namespace chunkgrpo
