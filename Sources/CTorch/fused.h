// Operations that do in one pass over memory what libtorch does in several; each has a plain form in Swift.
#ifndef CTORCH_FUSED_H
#define CTORCH_FUSED_H

#include <ATen/ATen.h>

#include <vector>

namespace chunkgrpo {

/* Whether x is where and what the kernels work on: float32 or bfloat16 on the CPU. */
bool fusible(const at::Tensor &x);
/* Whether attention can be fused: brgemm knows this processor and the type. */
bool attention_fusible(at::ScalarType type);

at::Tensor modulated_norm(const at::Tensor &x, const at::Tensor &shift, const at::Tensor &scale, double eps);
at::Tensor tanh_gelu(const at::Tensor &x);
at::Tensor gated_add(const at::Tensor &x, const at::Tensor &gate, const at::Tensor &y);
std::vector<at::Tensor> joint_attention(const std::vector<at::Tensor> &projections, const std::vector<at::Tensor> &gains,
                                        const at::Tensor &rotation, int64_t heads, int64_t size, double eps);
/* An adapter of one layer among those of a joined product. */
struct Adapter {
  at::Tensor down, up;
  double scale;
  int64_t start;  // of its layer's rows in the joined product's output
};
/* What the products of a frozen bfloat16 layer read, laid out for brgemm; undefined members where there is no adapter. */
struct PackedLinear {
  at::Tensor forward, backward, down, up, bias;
};
/* `down` [R, in] and `up` [out, R]: all adapters' factors side by side, or undefined. */
PackedLinear pack_linear(const at::Tensor &weight, const std::optional<at::Tensor> &bias, const at::Tensor &down,
                         const at::Tensor &up);
at::Tensor packed_linear(const at::Tensor &x, const PackedLinear &packed, const std::vector<Adapter> &adapters);
/* The same of layers that are trained themselves: `weights` holds each one's weight and bias, float32 leaves (an empty
   tensor for no bias), `starts` their first rows. */
at::Tensor packed_linear(const at::Tensor &x, const PackedLinear &packed, const std::vector<at::Tensor> &weights,
                         const std::vector<int64_t> &starts);
at::Tensor adapted_linear(const at::Tensor &x, const at::Tensor &weight, const std::optional<at::Tensor> &bias,
                          const at::Tensor &packed_down, const at::Tensor &packed_up,
                          const std::vector<Adapter> &adapters);

}  // namespace chunkgrpo

#endif
