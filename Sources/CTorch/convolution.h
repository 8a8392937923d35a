// Convolutions of small images with what stands before and after them in a residual block, without gradients.
#ifndef CTORCH_CONVOLUTION_H
#define CTORCH_CONVOLUTION_H

#include <ATen/ATen.h>

namespace chunkgrpo {

/* A group norm followed by SiLU; no groups: neither. */
struct NormSilu {
  int64_t groups;
  std::optional<at::Tensor> gain, offset;
  double eps;
};

/* See ctorch_pack_convolution: [phases, rows of taps, k, outputs up to a multiple of 16], columns in blocks. */
at::Tensor pack_convolution(const at::Tensor &weight, bool doubled);
/* See ctorch_convolution. */
at::Tensor convolution(const at::Tensor &x, const at::Tensor &packed, const std::optional<at::Tensor> &bias,
                       int64_t channels, const NormSilu &norm, const std::optional<at::Tensor> &addend);

}  // namespace chunkgrpo

#endif
