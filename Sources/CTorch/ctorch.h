/* C ABI over libtorch: the only place where Swift and C++ meet.
 *
 * Every function that can fail returns 0, or -1 with the message in ctorch_last_error() of the same thread.
 * `ctorch_tensor *out` receives a new reference: release it with ctorch_tensor_free. Other arguments are
 * borrowed. NULL stands for "no tensor" where a comment says so. No C++ exception escapes. The first call on
 * a thread turns flush-denormal on there (it is thread-local, and denormals made training 3.6x slower).
 */
#ifndef CTORCH_H
#define CTORCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CTORCH_API __attribute__((visibility("default")))

/* Raised whenever a signature below changes; the Swift side refuses a library with another number. */
#define CTORCH_ABI_VERSION 5

typedef struct ctorch_tensor_opaque *ctorch_tensor;

/* dtypes: the numbers of c10::ScalarType, pinned by static_assert in ctorch.cpp. */
enum {
  CTORCH_UINT8 = 0, CTORCH_INT8 = 1, CTORCH_INT32 = 3, CTORCH_INT64 = 4, CTORCH_FLOAT16 = 5, CTORCH_FLOAT32 = 6,
  CTORCH_FLOAT64 = 7, CTORCH_COMPLEX64 = 9, CTORCH_BOOL = 11, CTORCH_BFLOAT16 = 15, CTORCH_FLOAT8 = 24
};
enum { CTORCH_CPU = 0, CTORCH_CUDA = 1 };

/* -- library ------------------------------------------------------------------------------------------- */
CTORCH_API int32_t ctorch_abi_version(void);
CTORCH_API const char *ctorch_torch_version(void); /* static storage */
CTORCH_API const char *ctorch_last_error(void);    /* valid until the next call on this thread */
CTORCH_API int64_t ctorch_live_tensors(void);      /* references handed out and not yet released */
CTORCH_API int32_t ctorch_num_threads(void);
CTORCH_API int32_t ctorch_set_num_threads(int32_t count);
CTORCH_API bool ctorch_cuda_available(void);
CTORCH_API bool ctorch_has_bfloat16_matmul(void);  /* CPU with native bfloat16 dot products */
CTORCH_API int32_t ctorch_synchronize(int32_t device, int32_t index);
/* Most bytes the device's allocator has held since the last reset; CUDA only. */
CTORCH_API int32_t ctorch_peak_memory(int64_t *bytes, int32_t device, int32_t index);
/* On the CPU: gives back to the system what is kept and not in use. */
CTORCH_API int32_t ctorch_reset_peak_memory(int32_t device, int32_t index);
/* Counts what the CPU allocator hands out on this thread until _end, which gives the most held at a time. */
CTORCH_API int32_t ctorch_watch_begin(void);
CTORCH_API int32_t ctorch_watch_end(int64_t *peak);
/* Free and total bytes of a CUDA device. */
CTORCH_API int32_t ctorch_device_memory(int64_t *free, int64_t *total);

/* -- modes of the calling thread: each returns the previous value --------------------------------------- */
CTORCH_API bool ctorch_set_grad_enabled(bool enabled);
CTORCH_API bool ctorch_grad_enabled(void);
CTORCH_API int32_t ctorch_autocast_get(int32_t device, bool *enabled, int32_t *dtype);
CTORCH_API int32_t ctorch_autocast_set(int32_t device, bool enabled, int32_t dtype); /* leaving clears the cache */

/* -- life, content --------------------------------------------------------------------------------------- */
CTORCH_API void ctorch_tensor_free(ctorch_tensor tensor);
CTORCH_API ctorch_tensor ctorch_retain(ctorch_tensor tensor); /* another reference, to be freed as well */
/* Copies `count` elements from `data`. */
CTORCH_API int32_t ctorch_from_data(ctorch_tensor *out, const void *data, int32_t dtype, const int64_t *sizes, int32_t rank);
/* No copy: `release(context)` runs when the last tensor on `data` goes. */
CTORCH_API int32_t ctorch_from_memory(ctorch_tensor *out, void *data, int32_t dtype, const int64_t *sizes, int32_t rank,
                                      void (*release)(void *), void *context);
CTORCH_API int32_t ctorch_full(ctorch_tensor *out, const int64_t *sizes, int32_t rank, double value, int32_t dtype, int32_t device, int32_t index);
CTORCH_API int32_t ctorch_arange(ctorch_tensor *out, double start, double end, double step, int32_t dtype);
/* Copies the contents, contiguous and in the tensor's own dtype, to `destination` of `bytes` bytes. */
CTORCH_API int32_t ctorch_read(ctorch_tensor tensor, void *destination, size_t bytes);
CTORCH_API int32_t ctorch_dtype(ctorch_tensor tensor);
CTORCH_API int32_t ctorch_rank(ctorch_tensor tensor);
CTORCH_API void ctorch_sizes(ctorch_tensor tensor, int64_t *sizes);
CTORCH_API void ctorch_device(ctorch_tensor tensor, int32_t *device, int32_t *index);
CTORCH_API bool ctorch_is_contiguous(ctorch_tensor tensor);
CTORCH_API int32_t ctorch_to_dtype(ctorch_tensor *out, ctorch_tensor tensor, int32_t dtype);
CTORCH_API int32_t ctorch_to_device(ctorch_tensor *out, ctorch_tensor tensor, int32_t device, int32_t index);
CTORCH_API int32_t ctorch_copy_(ctorch_tensor self, ctorch_tensor source);
CTORCH_API int32_t ctorch_add_(ctorch_tensor self, ctorch_tensor other, double alpha);
CTORCH_API int32_t ctorch_mul_scalar_(ctorch_tensor self, double factor);

/* -- elementwise ------------------------------------------------------------------------------------------- */
#define CTORCH_UNARY_OPS(X)                                                                                   \
  X(abs) X(clone) X(contiguous) X(cos) X(detach) X(exp) X(floor) X(isfinite) X(log) X(logical_not) X(neg)      \
  X(reciprocal) X(round) X(rsqrt) X(sigmoid) X(silu) X(sin) X(sqrt) X(square) X(tanh) X(view_as_complex)       \
  X(view_as_real) X(conj)
#define CTORCH_BINARY_OPS(X)                                                                                  \
  X(add) X(sub) X(mul) X(div) X(maximum) X(minimum) X(matmul) X(pow) X(eq) X(ne) X(lt) X(le) X(gt) X(ge)       \
  X(logical_and) X(logical_or)
#define CTORCH_SCALAR_OPS(X) X(add) X(sub) X(mul) X(div) X(pow) X(eq) X(ne) X(lt) X(le) X(gt) X(ge)
#define CTORCH_DECLARE_UNARY(op) CTORCH_API int32_t ctorch_##op(ctorch_tensor *out, ctorch_tensor a);
#define CTORCH_DECLARE_BINARY(op) CTORCH_API int32_t ctorch_##op(ctorch_tensor *out, ctorch_tensor a, ctorch_tensor b);
#define CTORCH_DECLARE_SCALAR(op) CTORCH_API int32_t ctorch_##op##_scalar(ctorch_tensor *out, ctorch_tensor a, double b);
CTORCH_UNARY_OPS(CTORCH_DECLARE_UNARY)
CTORCH_BINARY_OPS(CTORCH_DECLARE_BINARY)
CTORCH_SCALAR_OPS(CTORCH_DECLARE_SCALAR)
CTORCH_API int32_t ctorch_clamp(ctorch_tensor *out, ctorch_tensor a, double low, double high);
CTORCH_API int32_t ctorch_gelu(ctorch_tensor *out, ctorch_tensor a, bool tanh_approximation);
CTORCH_API int32_t ctorch_where(ctorch_tensor *out, ctorch_tensor condition, ctorch_tensor a, ctorch_tensor b);
CTORCH_API int32_t ctorch_addcmul(ctorch_tensor *out, ctorch_tensor a, ctorch_tensor b, ctorch_tensor c); /* a + b*c */

/* -- shape ----------------------------------------------------------------------------------------------- */
CTORCH_API int32_t ctorch_reshape(ctorch_tensor *out, ctorch_tensor a, const int64_t *sizes, int32_t rank);
CTORCH_API int32_t ctorch_permute(ctorch_tensor *out, ctorch_tensor a, const int64_t *dims, int32_t count);
CTORCH_API int32_t ctorch_transpose(ctorch_tensor *out, ctorch_tensor a, int64_t d0, int64_t d1);
CTORCH_API int32_t ctorch_narrow(ctorch_tensor *out, ctorch_tensor a, int64_t dim, int64_t start, int64_t length);
CTORCH_API int32_t ctorch_select(ctorch_tensor *out, ctorch_tensor a, int64_t dim, int64_t index);
CTORCH_API int32_t ctorch_index_select(ctorch_tensor *out, ctorch_tensor a, int64_t dim, ctorch_tensor index);
CTORCH_API int32_t ctorch_gather(ctorch_tensor *out, ctorch_tensor a, int64_t dim, ctorch_tensor index);
CTORCH_API int32_t ctorch_unsqueeze(ctorch_tensor *out, ctorch_tensor a, int64_t dim);
CTORCH_API int32_t ctorch_squeeze(ctorch_tensor *out, ctorch_tensor a, int64_t dim);
CTORCH_API int32_t ctorch_expand(ctorch_tensor *out, ctorch_tensor a, const int64_t *sizes, int32_t rank);
CTORCH_API int32_t ctorch_repeat_interleave(ctorch_tensor *out, ctorch_tensor a, int64_t repeats, int64_t dim);
CTORCH_API int32_t ctorch_cat(ctorch_tensor *out, const ctorch_tensor *list, int32_t count, int64_t dim);
CTORCH_API int32_t ctorch_stack(ctorch_tensor *out, const ctorch_tensor *list, int32_t count, int64_t dim);
CTORCH_API int32_t ctorch_pad(ctorch_tensor *out, ctorch_tensor a, const int64_t *padding, int32_t count, double value);

/* -- reductions; count 0 reduces everything ---------------------------------------------------------------- */
CTORCH_API int32_t ctorch_sum(ctorch_tensor *out, ctorch_tensor a, const int64_t *dims, int32_t count, bool keep);
CTORCH_API int32_t ctorch_mean(ctorch_tensor *out, ctorch_tensor a, const int64_t *dims, int32_t count, bool keep);
CTORCH_API int32_t ctorch_amax(ctorch_tensor *out, ctorch_tensor a, const int64_t *dims, int32_t count, bool keep);
CTORCH_API int32_t ctorch_amin(ctorch_tensor *out, ctorch_tensor a, const int64_t *dims, int32_t count, bool keep);
CTORCH_API int32_t ctorch_var(ctorch_tensor *out, ctorch_tensor a, const int64_t *dims, int32_t count, double correction, bool keep);
CTORCH_API int32_t ctorch_argmax(ctorch_tensor *out, ctorch_tensor a, int64_t dim, bool keep);
CTORCH_API int32_t ctorch_min_dim(ctorch_tensor *values, ctorch_tensor *indices, ctorch_tensor a, int64_t dim, bool keep);
CTORCH_API int32_t ctorch_softmax(ctorch_tensor *out, ctorch_tensor a, int64_t dim);

/* -- layers; weight, bias, mask may be NULL ------------------------------------------------------------------ */
CTORCH_API int32_t ctorch_linear(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, ctorch_tensor bias);
CTORCH_API int32_t ctorch_layer_norm(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, ctorch_tensor bias, double eps);
CTORCH_API int32_t ctorch_group_norm(ctorch_tensor *out, ctorch_tensor x, int64_t groups, ctorch_tensor weight, ctorch_tensor bias, double eps);
CTORCH_API int32_t ctorch_rms_norm(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, double eps); /* statistics in float32 */
CTORCH_API int32_t ctorch_conv2d(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, ctorch_tensor bias, int64_t stride, int64_t padding);
CTORCH_API int32_t ctorch_upsample_nearest(ctorch_tensor *out, ctorch_tensor x, double factor);
CTORCH_API int32_t ctorch_attention(ctorch_tensor *out, ctorch_tensor q, ctorch_tensor k, ctorch_tensor v, ctorch_tensor mask, double scale); /* scale 0: 1/sqrt(d) */
/* beta*a + alpha*(b @ c), batched */
CTORCH_API int32_t ctorch_baddbmm(ctorch_tensor *out, ctorch_tensor a, ctorch_tensor b, ctorch_tensor c, double beta, double alpha);
CTORCH_API int32_t ctorch_addmm(ctorch_tensor *out, ctorch_tensor a, ctorch_tensor b, ctorch_tensor c, double alpha); /* a + alpha*(b @ c), 2-D */
CTORCH_API int32_t ctorch_rfft2(ctorch_tensor *out, ctorch_tensor x, int64_t height, int64_t width);
CTORCH_API int32_t ctorch_irfft2(ctorch_tensor *out, ctorch_tensor x, int64_t height, int64_t width);

/* -- autograd and optimisation ------------------------------------------------------------------------------- */
CTORCH_API bool ctorch_requires_grad(ctorch_tensor tensor);
CTORCH_API int32_t ctorch_set_requires_grad(ctorch_tensor tensor, bool value);
CTORCH_API int32_t ctorch_grad(ctorch_tensor *out, ctorch_tensor tensor); /* *out is NULL where there is none */
CTORCH_API int32_t ctorch_clear_grad(ctorch_tensor tensor);
CTORCH_API int32_t ctorch_backward(ctorch_tensor loss, ctorch_tensor gradient); /* gradient NULL: 1 for a scalar */
/* A function of tensors: takes over `inputs`, hands out at most `capacity` `outputs` and returns their number, or -1
 * after ctorch_fail(). It may be called from another thread than the one that passed it. */
typedef int32_t (*ctorch_body)(void *context, const ctorch_tensor *inputs, int32_t count, ctorch_tensor *outputs,
                               int32_t capacity);
/* Sets the message of a body that returns -1. */
CTORCH_API void ctorch_fail(const char *message);
/* Runs `body` without recording it and keeps only the inputs: backward runs it once more, recorded, and goes through
 * that. Leaves that `body` knows by itself get their gradients there. `release(context)` runs once, when the last
 * output's graph goes or when this fails. *outputs has room for `capacity` tensors; their number goes to *produced. */
CTORCH_API int32_t ctorch_checkpointed(ctorch_tensor *outputs, int32_t capacity, int32_t *produced,
                                       const ctorch_tensor *inputs, int32_t count, ctorch_body body,
                                       void (*release)(void *), void *context);
CTORCH_API int32_t ctorch_total_norm(ctorch_tensor *out, const ctorch_tensor *list, int32_t count); /* 2-norm over all, float32 scalar */
CTORCH_API int32_t ctorch_foreach_mul_(const ctorch_tensor *list, int32_t count, double factor);
CTORCH_API int32_t ctorch_fused_adamw_(const ctorch_tensor *params, const ctorch_tensor *grads, const ctorch_tensor *means,
                                       const ctorch_tensor *squares, const ctorch_tensor *steps, int32_t count,
                                       double lr, double beta1, double beta2, double weight_decay, double eps);
/* AdamW step number `step` (from 1) of one contiguous float32 parameter of n elements. Moments are codes uint8
 * [ceil(n / 256), 256] with one float32 scale a row: value = scale * code_table[code]; `roots` holds the square root of
 * the second moment. Tables ascend, float32; that of the roots starts at 0. Codes are rounded so that the moments are
 * kept on average over steps; which way is a function of (element, step). */
CTORCH_API int32_t ctorch_blockwise_adamw_(ctorch_tensor param, ctorch_tensor grad, ctorch_tensor means, ctorch_tensor mean_scales,
                                           ctorch_tensor roots, ctorch_tensor root_scales, ctorch_tensor mean_table,
                                           ctorch_tensor root_table, int64_t step, double lr, double beta1, double beta2,
                                           double weight_decay, double eps);

/* -- frozen weights of one byte ------------------------------------------------------------------------------ */
/* weight [out, in] -> codes of `dtype` (int8 or float8) and scales [out] float32, weight ~ scales * codes. */
CTORCH_API int32_t ctorch_quantise_rows(ctorch_tensor *codes, ctorch_tensor *scales, ctorch_tensor weight, int32_t dtype);
CTORCH_API int32_t ctorch_dequantise_rows(ctorch_tensor *out, ctorch_tensor codes, ctorch_tensor scales, int32_t dtype);
/* linear() of the dequantised weight in x's dtype; only codes and scales are kept for backward, which gives the
 * gradient of x alone. bias may be NULL. */
CTORCH_API int32_t ctorch_quantised_linear(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor codes, ctorch_tensor scales, ctorch_tensor bias);

/* -- fused operations, each one pass over memory -------------------------------------------------------------- */
/* Whether the next three take this tensor: float32 or bfloat16 on the CPU; and whether this processor has the
 * small matrix products of ctorch_joint_attention in `dtype`. */
CTORCH_API bool ctorch_fusible(ctorch_tensor tensor);
CTORCH_API bool ctorch_attention_fusible(int32_t dtype);
/* LayerNorm(x) (1 + scale) + shift over the last dimension: x [B, S, D], shift and scale [B, 1, D]. */
CTORCH_API int32_t ctorch_modulated_norm(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor shift, ctorch_tensor scale, double eps);
/* x + gate y: x and y [B, S, D], gate [B, 1, D]. */
CTORCH_API int32_t ctorch_gated_add(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor gate, ctorch_tensor y);
/* Attention of `count` streams over all their tokens. projections[i] [B, S_i, 3 H D + tail_i] holds queries, keys,
 * values and what goes through a tanh-GELU; outputs[i] [B, S_i, H D + tail_i]. gains[i] [2, D] (queries, keys) or
 * gains NULL: no norm; rotation [sum S_i, D] float32, cosines and sines in turn, or NULL. */
CTORCH_API int32_t ctorch_joint_attention(ctorch_tensor *outputs, const ctorch_tensor *projections,
                                          const ctorch_tensor *gains, int32_t count, ctorch_tensor rotation,
                                          int64_t heads, int64_t size, double eps);
/* x Wt + b + (x down_t) up_t. `down` [R, in] and `up` [out, R] hold the layers' factors side by side, up scaled, block
 * by block in rows from starts[i] on; gradients go to the leaves downs[i], ups[i]. bias may be NULL. */
CTORCH_API int32_t ctorch_adapted_linear(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, ctorch_tensor bias,
                                         ctorch_tensor down, ctorch_tensor up, const ctorch_tensor *downs,
                                         const ctorch_tensor *ups, const double *scales, const int64_t *starts,
                                         int32_t count);
/* Lays a frozen bfloat16 layer out for ctorch_packed_linear, on the CPU: *packed has room for five tensors, of which
 * the third and fourth stay NULL without adapters (`down` and `up` NULL). All sizes must be even. */
CTORCH_API int32_t ctorch_pack_linear(ctorch_tensor *packed, ctorch_tensor weight, ctorch_tensor bias,
                                      ctorch_tensor down, ctorch_tensor up);
/* As ctorch_adapted_linear, from such a layout; x is bfloat16. */
CTORCH_API int32_t ctorch_packed_linear(ctorch_tensor *out, ctorch_tensor x, const ctorch_tensor *packed,
                                        const ctorch_tensor *downs, const ctorch_tensor *ups, const double *scales,
                                        const int64_t *starts, int32_t count);
/* The same of `count` layers that are trained themselves, from a layout of their bfloat16 values: gradients go to the
 * leaves weights[i] and biases[i] (`biases` NULL for none). */
CTORCH_API int32_t ctorch_packed_trained_linear(ctorch_tensor *out, ctorch_tensor x, const ctorch_tensor *packed,
                                                const ctorch_tensor *weights, const ctorch_tensor *biases,
                                                const int64_t *starts, int32_t count);
/* Lays the weight [O, C, k, k] of a convolution of stride 1 and padding k / 2 out for ctorch_convolution; k is 1 or 3, C
 * even, the weight float32 or bfloat16. `doubled` (k = 3): for inputs whose sides nearest-neighbour upsampling doubles. */
CTORCH_API int32_t ctorch_pack_convolution(ctorch_tensor *out, ctorch_tensor weight, bool doubled);
/* conv(silu(group_norm(x))) + bias + addend of x [B, C, H, W] from such a layout, without gradients; groups 0: no norm
 * and no SiLU. The result is channels-last, and so is best x. bias, gain, offset and addend may be NULL. */
CTORCH_API int32_t ctorch_convolution(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor packed, ctorch_tensor bias,
                                      int64_t channels, int64_t groups, ctorch_tensor gain, ctorch_tensor offset,
                                      double eps, ctorch_tensor addend);
/* Grows with every change in place. */
CTORCH_API int64_t ctorch_version(ctorch_tensor tensor);

#ifdef __cplusplus
}
#endif
#endif
