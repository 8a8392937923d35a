// The C ABI of ctorch.h. Built by the Makefile against the chosen libtorch into lib/libctorch.so.
#include "ctorch.h"

#include "convolution.h"
#include "fused.h"
#include "memory.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/version.h>

#include <dlfcn.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if TORCH_VERSION_MAJOR != 2 || TORCH_VERSION_MINOR < 10 || TORCH_VERSION_MINOR > 13
#error "chunkgrpo needs libtorch 2.10 to 2.13"
#endif

// Level of libtorch's own messages; not there in builds that log through glog.
extern int FLAGS_caffe2_log_level __attribute__((weak));

namespace {

using at::Tensor;

static_assert(int(at::kByte) == CTORCH_UINT8 && int(at::kInt) == CTORCH_INT32 && int(at::kLong) == CTORCH_INT64);
static_assert(int(at::kHalf) == CTORCH_FLOAT16 && int(at::kFloat) == CTORCH_FLOAT32);
static_assert(int(at::kDouble) == CTORCH_FLOAT64 && int(at::kComplexFloat) == CTORCH_COMPLEX64);
static_assert(int(at::kBool) == CTORCH_BOOL && int(at::kBFloat16) == CTORCH_BFLOAT16);
static_assert(int(at::kChar) == CTORCH_INT8 && int(at::kFloat8_e4m3fn) == CTORCH_FLOAT8);

thread_local std::string last_error;
std::atomic<int64_t> live{0};

Tensor &unwrap(ctorch_tensor t) { return *reinterpret_cast<Tensor *>(t); }

ctorch_tensor wrap(Tensor t) {
  auto *p = new Tensor(std::move(t));
  live.fetch_add(1, std::memory_order_relaxed);
  return reinterpret_cast<ctorch_tensor>(p);
}

std::optional<Tensor> optional(ctorch_tensor t) { return t ? std::optional<Tensor>(unwrap(t)) : std::nullopt; }

std::vector<Tensor> list(const ctorch_tensor *items, int32_t count) {
  std::vector<Tensor> r;
  r.reserve(count);
  for (int32_t i = 0; i < count; i++) r.push_back(unwrap(items[i]));
  return r;
}

at::IntArrayRef ints(const int64_t *p, int32_t n) { return at::IntArrayRef(p, size_t(n)); }
at::ScalarType dtype(int32_t d) { return static_cast<at::ScalarType>(d); }
at::Device place(int32_t device, int32_t index) {
  return device == CTORCH_CPU ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
}
at::DeviceType kind(int32_t device) { return device == CTORCH_CPU ? at::kCPU : at::kCUDA; }

void enter_thread() {
#if defined(__GLIBC__)
  // Activations of a few MiB come and go with every operation: giving them back to the system each time costs page
  // faults, 5 % of a training step where measured.
  static const bool kept = mallopt(M_MMAP_THRESHOLD, 32 << 20) + mallopt(M_TRIM_THRESHOLD, 256 << 20) == 2;
  (void)kept;
#endif
  static const bool keeps = (chunkgrpo::keep_large_buffers(), true);
  (void)keeps;
  thread_local const bool entered = [] { return at::globalContext().setFlushDenormal(true), true; }();
  (void)entered;
}

template <class F>
int32_t guarded(F &&body) {
  try {
    enter_thread();
    body();
    return 0;
  } catch (const c10::Error &e) {
    last_error = e.what_without_backtrace();
  } catch (const std::exception &e) {
    last_error = e.what();
  } catch (...) {
    last_error = "unknown C++ exception";
  }
  return -1;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/* Autocast of this thread, for the devices this package knows. */
struct Autocast {
  struct Entry {
    at::DeviceType device;
    bool enabled;
    at::ScalarType type;
  };
  std::vector<Entry> entries;
  Autocast() {
    for (auto device : {at::kCPU, at::kCUDA})
      entries.push_back({device, at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device)});
  }
  void enter() const {
    for (const auto &e : entries) {
      at::autocast::set_autocast_enabled(e.device, e.enabled);
      at::autocast::set_autocast_dtype(e.device, e.type);
    }
  }
};

/* A function of tensors that lives in Swift, with the modes in which it was first run. */
struct Body : torch::CustomClassHolder {
  ctorch_body run;
  void (*release)(void *);
  void *context;
  Autocast autocast;

  Body(ctorch_body run, void (*release)(void *), void *context) : run(run), release(release), context(context) {}
  Body(const Body &) = delete;
  Body &operator=(const Body &) = delete;
  ~Body() override { release(context); }

  variable_list operator()(const variable_list &inputs) const {
    std::vector<ctorch_tensor> taken;
    for (const auto &t : inputs) taken.push_back(wrap(t));
    std::vector<ctorch_tensor> given(16, nullptr);
    // Casts cached in a pass that records nothing would cut later ones off from their weights.
    const bool cached = at::autocast::is_autocast_cache_enabled();
    at::autocast::set_autocast_cache_enabled(false);
    int32_t count = run(context, taken.data(), int32_t(taken.size()), given.data(), int32_t(given.size()));
    at::autocast::set_autocast_cache_enabled(cached);
    if (count < 0) throw std::runtime_error(last_error);
    variable_list outputs;
    for (int32_t i = 0; i < count; i++) {
      outputs.push_back(unwrap(given[i]));
      ctorch_tensor_free(given[i]);
    }
    return outputs;
  }
};

struct Checkpointed : torch::autograd::Function<Checkpointed> {
  /* `anchor` is a leaf, so that outputs have a graph also where only leaves inside the body need gradients. */
  static variable_list forward(AutogradContext *ctx, const Tensor &, at::TensorList inputs,
                               const c10::intrusive_ptr<Body> &body) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(inputs.vec());
    ctx->saved_data["body"] = c10::IValue::make_capsule(body);
    variable_list outputs = (*body)(inputs.vec()), constant;
    for (auto &t : outputs) {
      const bool given = std::any_of(inputs.begin(), inputs.end(), [&](const Tensor &input) { return input.is_same(t); });
      // A leaf that the body handed through would itself become an output of this node.
      if (t.requires_grad() && !given) t = t.detach();
      if (!t.is_floating_point() && !t.is_complex()) constant.push_back(t);
    }
    ctx->mark_non_differentiable(constant);
    return outputs;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &gradients) {
    enter_thread();  // of a CUDA graph this is libtorch's thread of the device
    auto body = c10::static_intrusive_pointer_cast<Body>(ctx->saved_data["body"].toCapsule());
    variable_list inputs;
    for (const auto &t : ctx->get_saved_variables()) inputs.push_back(t.detach().set_requires_grad(t.requires_grad()));
    struct Restored {
      Autocast before;
      ~Restored() { before.enter(); }
    } restored;
    body->autocast.enter();
    {
      at::AutoGradMode recording(true);
      variable_list outputs = (*body)(inputs), roots, seeds;
      TORCH_CHECK(outputs.size() == gradients.size(), "the body gave ", gradients.size(), " tensors and, run again, ",
                  outputs.size());
      for (size_t i = 0; i < outputs.size(); i++) {
        if (!gradients[i].defined() || !outputs[i].requires_grad()) continue;
        roots.push_back(outputs[i]);
        seeds.push_back(gradients[i]);
      }
      if (!roots.empty()) torch::autograd::backward(roots, seeds);
    }
    variable_list result(1);
    for (const auto &t : inputs) result.push_back(t.grad());
    result.emplace_back();
    return result;
  }
};

Tensor dequantised(const Tensor &codes, const Tensor &scales, at::ScalarType type) {
  return codes.to(at::kFloat).mul_(scales.unsqueeze(1)).to(type);
}

struct QuantisedLinear : torch::autograd::Function<QuantisedLinear> {
  static Tensor forward(AutogradContext *ctx, const Tensor &x, const Tensor &codes, const Tensor &scales,
                        const std::optional<Tensor> &bias) {
    ctx->save_for_backward({codes, scales});
    return at::linear(x, dequantised(codes, scales, x.scalar_type()), bias);
  }
  static variable_list backward(AutogradContext *ctx, const variable_list &gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = gradients[0];
    auto shape = g.sizes().vec();
    shape.back() = saved[0].size(1);
    // Flat, as linear() does it: the same product gives the same bits.
    Tensor rows = g.reshape({-1, g.size(-1)}).mm(dequantised(saved[0], saved[1], g.scalar_type()));
    return {rows.reshape(shape), Tensor(), Tensor(), Tensor()};
  }
};

/* One moment in blocks of 256: a code a value, a scale a block. */
struct Blocks {
  Tensor codes, scales, table;
  bool squared;  // whether what is kept on average is the square of the values

  Tensor values() const {
    return table.index_select(0, codes.reshape(-1).to(at::kInt)).view(codes.sizes()).mul_(scales.unsqueeze(1));
  }
  /* Takes the larger neighbour where the value's place between the two is above `threshold`, in 0 ... 1. */
  void set(const Tensor &values, const Tensor &threshold) {
    Tensor largest = values.abs().amax(1);
    Tensor y = values / at::where(largest > 0, largest, at::ones_like(largest)).unsqueeze(1);
    Tensor index = at::bucketize(y, table, /*out_int32=*/true, /*right=*/true).sub_(1).clamp_(0, table.numel() - 2);
    Tensor low = table.index_select(0, index.view(-1)).view(y.sizes());
    Tensor high = table.index_select(0, (index + 1).view(-1)).view(y.sizes());
    Tensor place = squared ? (y * y - low * low) / (high * high - low * low) : (y - low) / (high - low);
    index += place > threshold;
    // A root that became 0 would leave its element without a denominator.
    if (squared) index = at::maximum(index, (y > 0).to(at::kInt));
    codes.copy_(index);
    scales.copy_(largest);
  }
};

// What the CPU allocator tells a profiler, added up.
struct AllocationWatch : c10::MemoryReportingInfoBase {
  std::atomic<int64_t> held{0}, peak{0};
  void reportMemoryUsage(void *, int64_t size, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    int64_t now = held += size, most = peak.load();
    while (now > most && !peak.compare_exchange_weak(most, now)) {}
  }
  bool memoryProfilingEnabled() const override { return true; }
};
struct Watching {
  // The profiler's warning about memory older than itself is of no use to a user.
  int level = &FLAGS_caffe2_log_level ? FLAGS_caffe2_log_level : 0;
  Watching() {
    if (&FLAGS_caffe2_log_level) FLAGS_caffe2_log_level = 2;
  }
  ~Watching() {
    if (&FLAGS_caffe2_log_level) FLAGS_caffe2_log_level = level;
  }
  std::shared_ptr<AllocationWatch> watch = std::make_shared<AllocationWatch>();
  c10::DebugInfoGuard guard{c10::DebugInfoKind::PROFILER_STATE, watch};
};
thread_local std::vector<std::unique_ptr<Watching>> watches;

}  // namespace

extern "C" {

int32_t ctorch_abi_version(void) { return CTORCH_ABI_VERSION; }
const char *ctorch_torch_version(void) { return TORCH_VERSION; }
const char *ctorch_last_error(void) { return last_error.c_str(); }
int64_t ctorch_live_tensors(void) { return live.load(); }
int32_t ctorch_num_threads(void) { return at::get_num_threads(); }
int32_t ctorch_set_num_threads(int32_t count) { return guarded([&] { at::set_num_threads(count); }); }
bool ctorch_cuda_available(void) { return at::detail::getCUDAHooks().hasCUDA(); }
bool ctorch_has_bfloat16_matmul(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;  // measured on x86-64 only; `network.dtype: bfloat16` asks for it elsewhere
#endif
}
int32_t ctorch_synchronize(int32_t device, int32_t index) {
  return guarded([&] {
    if (device == CTORCH_CUDA) at::detail::getCUDAHooks().deviceSynchronize(static_cast<c10::DeviceIndex>(index));
  });
}
int32_t ctorch_peak_memory(int64_t *bytes, int32_t device, int32_t index) {
  return guarded([&] {
    TORCH_CHECK(at::detail::getCUDAHooks().hasCUDA(), "no CUDA device");
    auto stats = c10::getDeviceAllocator(kind(device))->getDeviceStats(static_cast<c10::DeviceIndex>(index));
    *bytes = stats.allocated_bytes[size_t(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  });
}
int32_t ctorch_reset_peak_memory(int32_t device, int32_t index) {
  return guarded([&] {
    if (device == CTORCH_CPU) return chunkgrpo::release_kept_buffers();
    TORCH_CHECK(at::detail::getCUDAHooks().hasCUDA(), "no CUDA device");
    c10::getDeviceAllocator(kind(device))->resetPeakStats(static_cast<c10::DeviceIndex>(index));
  });
}

int32_t ctorch_watch_begin(void) {
  return guarded([&] { watches.push_back(std::make_unique<Watching>()); });
}
int32_t ctorch_watch_end(int64_t *peak) {
  return guarded([&] {
    TORCH_CHECK(!watches.empty(), "nothing is watched");
    *peak = watches.back()->watch->peak.load();
    watches.pop_back();
  });
}
int32_t ctorch_device_memory(int64_t *free, int64_t *total) {
  return guarded([&] {
    // From the CUDA runtime that libtorch has loaded: a build against the CPU library has none.
    auto query = reinterpret_cast<int (*)(size_t *, size_t *)>(dlsym(RTLD_DEFAULT, "cudaMemGetInfo"));
    size_t available = 0, all = 0;
    TORCH_CHECK(query != nullptr && query(&available, &all) == 0, "no CUDA runtime");
    *free = static_cast<int64_t>(available);
    *total = static_cast<int64_t>(all);
  });
}

bool ctorch_set_grad_enabled(bool enabled) {
  bool before = c10::GradMode::is_enabled();
  c10::GradMode::set_enabled(enabled);
  return before;
}
bool ctorch_grad_enabled(void) { return c10::GradMode::is_enabled(); }
int32_t ctorch_autocast_get(int32_t device, bool *enabled, int32_t *type) {
  return guarded([&] {
    *enabled = at::autocast::is_autocast_enabled(kind(device));
    *type = int32_t(at::autocast::get_autocast_dtype(kind(device)));
  });
}
int32_t ctorch_autocast_set(int32_t device, bool enabled, int32_t type) {
  return guarded([&] {
    at::autocast::set_autocast_enabled(kind(device), enabled);
    at::autocast::set_autocast_dtype(kind(device), dtype(type));
    if (!enabled) at::autocast::clear_cache();
  });
}

void ctorch_tensor_free(ctorch_tensor t) {
  if (!t) return;
  delete &unwrap(t);
  live.fetch_sub(1, std::memory_order_relaxed);
}
ctorch_tensor ctorch_retain(ctorch_tensor t) { return wrap(unwrap(t)); }
int32_t ctorch_from_data(ctorch_tensor *out, const void *data, int32_t type, const int64_t *sizes, int32_t rank) {
  return guarded([&] {
    Tensor t = at::empty(ints(sizes, rank), at::TensorOptions().dtype(dtype(type)));
    std::memcpy(t.data_ptr(), data, t.nbytes());
    *out = wrap(std::move(t));
  });
}
int32_t ctorch_from_memory(ctorch_tensor *out, void *data, int32_t type, const int64_t *sizes, int32_t rank,
                           void (*release)(void *), void *context) {
  return guarded([&] {
    // A from_blob that throws may still run its deleter: the memory is handed over only when it has not.
    auto taken = std::make_shared<bool>(false);
    auto free = [=](void *) {
      if (*taken) release(context);
    };
    *out = wrap(at::from_blob(data, ints(sizes, rank), free, at::TensorOptions().dtype(dtype(type))));
    *taken = true;
  });
}
int32_t ctorch_full(ctorch_tensor *out, const int64_t *sizes, int32_t rank, double value, int32_t type, int32_t device,
                    int32_t index) {
  return guarded([&] {
    *out = wrap(at::full(ints(sizes, rank), value, at::TensorOptions().dtype(dtype(type)).device(place(device, index))));
  });
}
int32_t ctorch_arange(ctorch_tensor *out, double start, double end, double step, int32_t type) {
  return guarded([&] { *out = wrap(at::arange(start, end, step, at::TensorOptions().dtype(dtype(type)))); });
}
int32_t ctorch_read(ctorch_tensor t, void *destination, size_t bytes) {
  return guarded([&] {
    Tensor c = unwrap(t).detach().to(at::kCPU).resolve_conj().contiguous();
    TORCH_CHECK(c.nbytes() == bytes, "tensor holds ", c.nbytes(), " bytes, buffer ", bytes);
    std::memcpy(destination, c.data_ptr(), bytes);
  });
}
int32_t ctorch_dtype(ctorch_tensor t) { return int32_t(unwrap(t).scalar_type()); }
int32_t ctorch_rank(ctorch_tensor t) { return int32_t(unwrap(t).dim()); }
void ctorch_sizes(ctorch_tensor t, int64_t *sizes) {
  auto s = unwrap(t).sizes();
  std::copy(s.begin(), s.end(), sizes);
}
void ctorch_device(ctorch_tensor t, int32_t *device, int32_t *index) {
  auto d = unwrap(t).device();
  *device = d.is_cuda() ? CTORCH_CUDA : CTORCH_CPU;
  *index = d.has_index() ? d.index() : 0;
}
bool ctorch_is_contiguous(ctorch_tensor t) { return unwrap(t).is_contiguous(); }
int32_t ctorch_to_dtype(ctorch_tensor *out, ctorch_tensor t, int32_t type) {
  return guarded([&] { *out = wrap(unwrap(t).to(dtype(type))); });
}
int32_t ctorch_to_device(ctorch_tensor *out, ctorch_tensor t, int32_t device, int32_t index) {
  return guarded([&] { *out = wrap(unwrap(t).to(place(device, index))); });
}
int32_t ctorch_copy_(ctorch_tensor self, ctorch_tensor source) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TORCH_CHECK(unwrap(self).sizes() == unwrap(source).sizes(), "shapes differ");
    unwrap(self).copy_(unwrap(source));
  });
}
int32_t ctorch_add_(ctorch_tensor self, ctorch_tensor other, double alpha) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    unwrap(self).add_(unwrap(other), alpha);
  });
}
int32_t ctorch_mul_scalar_(ctorch_tensor self, double factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    unwrap(self).mul_(factor);
  });
}

#define DEFINE_UNARY(op) \
  int32_t ctorch_##op(ctorch_tensor *out, ctorch_tensor a) { return guarded([&] { *out = wrap(op(unwrap(a))); }); }
#define DEFINE_BINARY(op)                                                   \
  int32_t ctorch_##op(ctorch_tensor *out, ctorch_tensor a, ctorch_tensor b) { \
    return guarded([&] { *out = wrap(at::op(unwrap(a), unwrap(b))); });     \
  }
#define DEFINE_SCALAR(op)                                                  \
  int32_t ctorch_##op##_scalar(ctorch_tensor *out, ctorch_tensor a, double b) { \
    return guarded([&] { *out = wrap(unwrap(a).op(b)); });                 \
  }
static Tensor contiguous(const Tensor &t) { return t.contiguous(); }  // a method only, unlike the others
CTORCH_UNARY_OPS(DEFINE_UNARY)
CTORCH_BINARY_OPS(DEFINE_BINARY)
CTORCH_SCALAR_OPS(DEFINE_SCALAR)

int32_t ctorch_clamp(ctorch_tensor *out, ctorch_tensor a, double low, double high) {
  return guarded([&] { *out = wrap(at::clamp(unwrap(a), low, high)); });
}
int32_t ctorch_gelu(ctorch_tensor *out, ctorch_tensor a, bool tanh_approximation) {
  return guarded([&] {
    const Tensor &x = unwrap(a);
    const bool fused = tanh_approximation && chunkgrpo::fusible(x);
    *out = wrap(fused ? chunkgrpo::tanh_gelu(x) : at::gelu(x, tanh_approximation ? "tanh" : "none"));
  });
}
int32_t ctorch_where(ctorch_tensor *out, ctorch_tensor c, ctorch_tensor a, ctorch_tensor b) {
  return guarded([&] { *out = wrap(at::where(unwrap(c), unwrap(a), unwrap(b))); });
}
int32_t ctorch_addcmul(ctorch_tensor *out, ctorch_tensor a, ctorch_tensor b, ctorch_tensor c) {
  return guarded([&] { *out = wrap(at::addcmul(unwrap(a), unwrap(b), unwrap(c))); });
}

int32_t ctorch_reshape(ctorch_tensor *out, ctorch_tensor a, const int64_t *sizes, int32_t rank) {
  return guarded([&] { *out = wrap(unwrap(a).reshape(ints(sizes, rank))); });
}
int32_t ctorch_permute(ctorch_tensor *out, ctorch_tensor a, const int64_t *dims, int32_t count) {
  return guarded([&] { *out = wrap(unwrap(a).permute(ints(dims, count))); });
}
int32_t ctorch_transpose(ctorch_tensor *out, ctorch_tensor a, int64_t d0, int64_t d1) {
  return guarded([&] { *out = wrap(unwrap(a).transpose(d0, d1)); });
}
int32_t ctorch_narrow(ctorch_tensor *out, ctorch_tensor a, int64_t dim, int64_t start, int64_t length) {
  return guarded([&] { *out = wrap(unwrap(a).narrow(dim, start, length)); });
}
int32_t ctorch_select(ctorch_tensor *out, ctorch_tensor a, int64_t dim, int64_t index) {
  return guarded([&] { *out = wrap(unwrap(a).select(dim, index)); });
}
int32_t ctorch_index_select(ctorch_tensor *out, ctorch_tensor a, int64_t dim, ctorch_tensor index) {
  return guarded([&] { *out = wrap(unwrap(a).index_select(dim, unwrap(index))); });
}
int32_t ctorch_gather(ctorch_tensor *out, ctorch_tensor a, int64_t dim, ctorch_tensor index) {
  return guarded([&] { *out = wrap(unwrap(a).gather(dim, unwrap(index))); });
}
int32_t ctorch_unsqueeze(ctorch_tensor *out, ctorch_tensor a, int64_t dim) {
  return guarded([&] { *out = wrap(unwrap(a).unsqueeze(dim)); });
}
int32_t ctorch_squeeze(ctorch_tensor *out, ctorch_tensor a, int64_t dim) {
  return guarded([&] { *out = wrap(unwrap(a).squeeze(dim)); });
}
int32_t ctorch_expand(ctorch_tensor *out, ctorch_tensor a, const int64_t *sizes, int32_t rank) {
  return guarded([&] { *out = wrap(unwrap(a).expand(ints(sizes, rank))); });
}
int32_t ctorch_repeat_interleave(ctorch_tensor *out, ctorch_tensor a, int64_t repeats, int64_t dim) {
  return guarded([&] { *out = wrap(unwrap(a).repeat_interleave(repeats, dim)); });
}
int32_t ctorch_cat(ctorch_tensor *out, const ctorch_tensor *items, int32_t count, int64_t dim) {
  return guarded([&] { *out = wrap(at::cat(list(items, count), dim)); });
}
int32_t ctorch_stack(ctorch_tensor *out, const ctorch_tensor *items, int32_t count, int64_t dim) {
  return guarded([&] { *out = wrap(at::stack(list(items, count), dim)); });
}
int32_t ctorch_pad(ctorch_tensor *out, ctorch_tensor a, const int64_t *padding, int32_t count, double value) {
  return guarded([&] { *out = wrap(at::constant_pad_nd(unwrap(a), ints(padding, count), value)); });
}

#define DEFINE_REDUCTION(op)                                                                                     \
  int32_t ctorch_##op(ctorch_tensor *out, ctorch_tensor t, const int64_t *dims, int32_t count, bool keep) {      \
    return guarded([&] { *out = wrap(at::op(unwrap(t), ints(dims, count), keep)); });                            \
  }
DEFINE_REDUCTION(sum)
DEFINE_REDUCTION(mean)
DEFINE_REDUCTION(amax)
DEFINE_REDUCTION(amin)
int32_t ctorch_var(ctorch_tensor *out, ctorch_tensor a, const int64_t *dims, int32_t count, double correction, bool keep) {
  return guarded([&] {
    at::OptionalIntArrayRef which;
    if (count > 0) which = ints(dims, count);
    *out = wrap(at::var(unwrap(a), which, at::Scalar(correction), keep));
  });
}
int32_t ctorch_argmax(ctorch_tensor *out, ctorch_tensor a, int64_t dim, bool keep) {
  return guarded([&] { *out = wrap(unwrap(a).argmax(dim, keep)); });
}
int32_t ctorch_min_dim(ctorch_tensor *values, ctorch_tensor *indices, ctorch_tensor a, int64_t dim, bool keep) {
  return guarded([&] {
    auto [v, i] = unwrap(a).min(dim, keep);
    *values = wrap(v);
    *indices = wrap(i);
  });
}
int32_t ctorch_softmax(ctorch_tensor *out, ctorch_tensor a, int64_t dim) {
  return guarded([&] { *out = wrap(unwrap(a).softmax(dim)); });
}

int32_t ctorch_linear(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, ctorch_tensor bias) {
  return guarded([&] { *out = wrap(at::linear(unwrap(x), unwrap(weight), optional(bias))); });
}
int32_t ctorch_layer_norm(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, ctorch_tensor bias, double eps) {
  return guarded([&] {
    const Tensor &t = unwrap(x);
    *out = wrap(at::layer_norm(t, t.sizes().slice(t.dim() - 1), optional(weight), optional(bias), eps));
  });
}
int32_t ctorch_group_norm(ctorch_tensor *out, ctorch_tensor x, int64_t groups, ctorch_tensor weight, ctorch_tensor bias, double eps) {
  return guarded([&] { *out = wrap(at::group_norm(unwrap(x), groups, optional(weight), optional(bias), eps)); });
}
int32_t ctorch_rms_norm(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, double eps) {
  return guarded([&] {
    const Tensor &t = unwrap(x);
    Tensor f = t.to(at::kFloat);
    Tensor r = t * at::rsqrt(at::mean(at::square(f), at::IntArrayRef{-1}, true) + eps).to(t.scalar_type());
    *out = wrap(weight ? r * unwrap(weight) : r);
  });
}
int32_t ctorch_conv2d(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, ctorch_tensor bias, int64_t stride, int64_t padding) {
  return guarded([&] {
    *out = wrap(at::conv2d(unwrap(x), unwrap(weight), optional(bias), at::IntArrayRef{stride, stride}, at::IntArrayRef{padding, padding}));
  });
}
int32_t ctorch_upsample_nearest(ctorch_tensor *out, ctorch_tensor x, double factor) {
  return guarded([&] {
    const Tensor &t = unwrap(x);
    *out = wrap(at::upsample_nearest2d(t, {int64_t(double(t.size(-2)) * factor), int64_t(double(t.size(-1)) * factor)}, factor, factor));
  });
}
int32_t ctorch_attention(ctorch_tensor *out, ctorch_tensor q, ctorch_tensor k, ctorch_tensor v, ctorch_tensor mask, double scale) {
  return guarded([&] {
    std::optional<double> factor;
    if (scale != 0) factor = scale;
    *out = wrap(at::scaled_dot_product_attention(unwrap(q), unwrap(k), unwrap(v), optional(mask), 0.0, false, factor));
  });
}
int32_t ctorch_baddbmm(ctorch_tensor *out, ctorch_tensor a, ctorch_tensor b, ctorch_tensor c, double beta, double alpha) {
  return guarded([&] { *out = wrap(at::baddbmm(unwrap(a), unwrap(b), unwrap(c), beta, alpha)); });
}
int32_t ctorch_addmm(ctorch_tensor *out, ctorch_tensor a, ctorch_tensor b, ctorch_tensor c, double alpha) {
  return guarded([&] { *out = wrap(at::addmm(unwrap(a), unwrap(b), unwrap(c), 1, alpha)); });
}
int32_t ctorch_rfft2(ctorch_tensor *out, ctorch_tensor x, int64_t height, int64_t width) {
  return guarded([&] { *out = wrap(at::fft_rfft2(unwrap(x), at::IntArrayRef{height, width})); });
}
int32_t ctorch_irfft2(ctorch_tensor *out, ctorch_tensor x, int64_t height, int64_t width) {
  return guarded([&] { *out = wrap(at::fft_irfft2(unwrap(x), at::IntArrayRef{height, width})); });
}

bool ctorch_requires_grad(ctorch_tensor t) { return unwrap(t).requires_grad(); }
int32_t ctorch_set_requires_grad(ctorch_tensor t, bool value) {
  return guarded([&] { unwrap(t).set_requires_grad(value); });
}
int32_t ctorch_grad(ctorch_tensor *out, ctorch_tensor t) {
  return guarded([&] {
    const Tensor &g = unwrap(t).grad();
    *out = g.defined() ? wrap(g) : nullptr;
  });
}
int32_t ctorch_clear_grad(ctorch_tensor t) {
  return guarded([&] { unwrap(t).mutable_grad() = Tensor(); });
}
int32_t ctorch_backward(ctorch_tensor loss, ctorch_tensor gradient) {
  return guarded([&] {
    std::vector<Tensor> seeds;
    if (gradient) seeds.push_back(unwrap(gradient));
    torch::autograd::backward({unwrap(loss)}, seeds);
  });
}
void ctorch_fail(const char *message) { last_error = message; }
int32_t ctorch_checkpointed(ctorch_tensor *outputs, int32_t capacity, int32_t *produced, const ctorch_tensor *inputs,
                            int32_t count, ctorch_body run, void (*release)(void *), void *context) {
  return guarded([&] {
    auto body = c10::make_intrusive<Body>(run, release, context);
    auto values = list(inputs, count);
    auto options = at::TensorOptions().dtype(at::kFloat).device(values.empty() ? at::kCPU : values[0].device());
    Tensor anchor = at::empty({0}, options).set_requires_grad(true);
    variable_list results = Checkpointed::apply(anchor, at::TensorList(values), body);
    TORCH_CHECK(int32_t(results.size()) <= capacity, "the body gave more than ", capacity, " tensors");
    for (size_t i = 0; i < results.size(); i++) outputs[i] = wrap(results[i]);
    *produced = int32_t(results.size());
  });
}
int32_t ctorch_total_norm(ctorch_tensor *out, const ctorch_tensor *items, int32_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    *out = wrap(at::linalg_vector_norm(at::stack(at::_foreach_norm(list(items, count), 2)).to(at::kFloat), 2));
  });
}
int32_t ctorch_foreach_mul_(const ctorch_tensor *items, int32_t count, double factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(list(items, count), factor);
  });
}
int32_t ctorch_fused_adamw_(const ctorch_tensor *params, const ctorch_tensor *grads, const ctorch_tensor *means,
                            const ctorch_tensor *squares, const ctorch_tensor *steps, int32_t count, double lr,
                            double beta1, double beta2, double weight_decay, double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto p = list(params, count), g = list(grads, count), m = list(means, count), s = list(squares, count),
         n = list(steps, count);
    at::_foreach_add_(n, 1);  // the kernel reads the number of this step, it does not count
    at::_fused_adamw_(p, g, m, s, /*max_exp_avg_sqs=*/{}, n, lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false);
    // The kernel leaves versions as they were, and adapters laid out for products would be taken for current.
    for (const auto &t : p) torch::autograd::impl::bump_version(t);
  });
}
int32_t ctorch_blockwise_adamw_(ctorch_tensor param, ctorch_tensor grad, ctorch_tensor means, ctorch_tensor mean_scales,
                                ctorch_tensor roots, ctorch_tensor root_scales, ctorch_tensor mean_table,
                                ctorch_tensor root_table, int64_t step, double lr, double beta1, double beta2,
                                double weight_decay, double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    constexpr int64_t block = 256, most = 16384;  // blocks at once: bounds what is held in float32 at a time
    Tensor p = unwrap(param).view(-1), g = unwrap(grad).reshape(-1);
    const int64_t blocks = unwrap(means).size(0), size = p.numel();
    TORCH_CHECK(g.numel() == size && (size + block - 1) / block == blocks, "gradient or moments of another size");
    const double first = 1 - std::pow(beta1, double(step)), second = 1 - std::pow(beta2, double(step));
    for (int64_t start = 0; start < blocks; start += most) {
      const int64_t rows = std::min(most, blocks - start), low = start * block;
      const int64_t length = std::min(rows * block, size - low);
      auto part = [&](ctorch_tensor t) { return unwrap(t).narrow(0, start, rows); };
      Blocks mean{part(means), part(mean_scales), unwrap(mean_table), false};
      Blocks root{part(roots), part(root_scales), unwrap(root_table), true};
      Tensor gradient = at::constant_pad_nd(g.narrow(0, low, length).to(at::kFloat), {0, rows * block - length}, 0);
      gradient = gradient.view({rows, block});
      Tensor m = mean.values().mul_(beta1).add_(gradient, 1 - beta1);
      Tensor r = root.values().square_().mul_(beta2).addcmul_(gradient, gradient, 1 - beta2).sqrt_();
      Tensor target = p.narrow(0, low, length);
      target.mul_(1 - lr * weight_decay);
      target.sub_((m / (r / std::sqrt(second)).add_(eps)).view(-1).narrow(0, 0, length), lr / first);
      // A lattice in (element, step): spread evenly over the elements of a block and over the steps of an element.
      Tensor threshold = at::arange(low, low + rows * block, p.options().dtype(at::kDouble));
      threshold = threshold.mul_(0.7548776662466927).add_(double(step) * 0.5698402909980532).frac_().to(at::kFloat);
      threshold = threshold.view({rows, block});
      mean.set(m, threshold);
      root.set(r, 1 - threshold);
    }
    torch::autograd::impl::bump_version(unwrap(param));
  });
}

int32_t ctorch_quantise_rows(ctorch_tensor *codes, ctorch_tensor *scales, ctorch_tensor weight, int32_t type) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TORCH_CHECK(unwrap(weight).dim() == 2, "expected a matrix");
    TORCH_CHECK(type == CTORCH_INT8 || type == CTORCH_FLOAT8, "expected int8 or float8");
    const double most = type == CTORCH_INT8 ? 127 : 448;  // 448: the largest finite e4m3
    Tensor w = unwrap(weight).to(at::kFloat);
    Tensor scale = w.abs().amax(1).div_(most);
    Tensor y = w / at::where(scale > 0, scale, at::ones_like(scale)).unsqueeze(1);
    if (type == CTORCH_INT8) y.round_();
    Tensor c = y.clamp_(-most, most).to(dtype(type));
    *codes = wrap(c);
    *scales = wrap(scale);
  });
}
int32_t ctorch_dequantise_rows(ctorch_tensor *out, ctorch_tensor codes, ctorch_tensor scales, int32_t type) {
  return guarded([&] { *out = wrap(dequantised(unwrap(codes), unwrap(scales), dtype(type))); });
}
int32_t ctorch_quantised_linear(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor codes, ctorch_tensor scales,
                                ctorch_tensor bias) {
  return guarded([&] {
    auto b = optional(bias);
    TORCH_CHECK(!b || !b->requires_grad(), "a quantised layer gives its bias no gradient");
    *out = wrap(QuantisedLinear::apply(unwrap(x), unwrap(codes), unwrap(scales), b));
  });
}

bool ctorch_fusible(ctorch_tensor t) { return chunkgrpo::fusible(unwrap(t)); }
bool ctorch_attention_fusible(int32_t type) { return chunkgrpo::attention_fusible(dtype(type)); }
int32_t ctorch_modulated_norm(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor shift, ctorch_tensor scale, double eps) {
  return guarded([&] { *out = wrap(chunkgrpo::modulated_norm(unwrap(x), unwrap(shift), unwrap(scale), eps)); });
}
int32_t ctorch_gated_add(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor gate, ctorch_tensor y) {
  return guarded([&] { *out = wrap(chunkgrpo::gated_add(unwrap(x), unwrap(gate), unwrap(y))); });
}
int32_t ctorch_joint_attention(ctorch_tensor *outputs, const ctorch_tensor *projections, const ctorch_tensor *gains,
                               int32_t count, ctorch_tensor rotation, int64_t heads, int64_t size, double eps) {
  return guarded([&] {
    auto norms = gains ? list(gains, count) : std::vector<Tensor>();
    auto results = chunkgrpo::joint_attention(list(projections, count), norms, rotation ? unwrap(rotation) : Tensor(),
                                              heads, size, eps);
    for (int32_t i = 0; i < count; i++) outputs[i] = wrap(results[size_t(i)]);
  });
}
static std::vector<chunkgrpo::Adapter> adapters(const ctorch_tensor *downs, const ctorch_tensor *ups,
                                                const double *scales, const int64_t *starts, int32_t count) {
  std::vector<chunkgrpo::Adapter> result;
  for (int32_t i = 0; i < count; i++) result.push_back({unwrap(downs[i]), unwrap(ups[i]), scales[i], starts[i]});
  return result;
}
int32_t ctorch_adapted_linear(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor weight, ctorch_tensor bias,
                              ctorch_tensor down, ctorch_tensor up, const ctorch_tensor *downs, const ctorch_tensor *ups,
                              const double *scales, const int64_t *starts, int32_t count) {
  return guarded([&] {
    *out = wrap(chunkgrpo::adapted_linear(unwrap(x), unwrap(weight), optional(bias), unwrap(down), unwrap(up),
                                          adapters(downs, ups, scales, starts, count)));
  });
}
int32_t ctorch_pack_linear(ctorch_tensor *packed, ctorch_tensor weight, ctorch_tensor bias, ctorch_tensor down, ctorch_tensor up) {
  return guarded([&] {
    auto p = chunkgrpo::pack_linear(unwrap(weight), optional(bias), down ? unwrap(down) : Tensor(), up ? unwrap(up) : Tensor());
    int32_t i = 0;
    for (auto &t : {p.forward, p.backward, p.down, p.up, p.bias}) packed[i++] = t.defined() ? wrap(t) : nullptr;
  });
}
int32_t ctorch_packed_linear(ctorch_tensor *out, ctorch_tensor x, const ctorch_tensor *packed, const ctorch_tensor *downs,
                             const ctorch_tensor *ups, const double *scales, const int64_t *starts, int32_t count) {
  return guarded([&] {
    auto part = [&](int i) { return packed[i] ? unwrap(packed[i]) : Tensor(); };
    *out = wrap(chunkgrpo::packed_linear(unwrap(x), {part(0), part(1), part(2), part(3), part(4)},
                                         adapters(downs, ups, scales, starts, count)));
  });
}
int32_t ctorch_packed_trained_linear(ctorch_tensor *out, ctorch_tensor x, const ctorch_tensor *packed,
                                     const ctorch_tensor *weights, const ctorch_tensor *biases, const int64_t *starts,
                                     int32_t count) {
  return guarded([&] {
    auto part = [&](int i) { return packed[i] ? unwrap(packed[i]) : Tensor(); };
    std::vector<Tensor> leaves;
    for (int32_t i = 0; i < count; i++) {
      leaves.push_back(unwrap(weights[i]));
      leaves.push_back(biases ? unwrap(biases[i]) : at::empty({0}));
    }
    *out = wrap(chunkgrpo::packed_linear(unwrap(x), {part(0), part(1), part(2), part(3), part(4)}, leaves,
                                         std::vector<int64_t>(starts, starts + count)));
  });
}
int32_t ctorch_pack_convolution(ctorch_tensor *out, ctorch_tensor weight, bool doubled) {
  return guarded([&] { *out = wrap(chunkgrpo::pack_convolution(unwrap(weight), doubled)); });
}
int32_t ctorch_convolution(ctorch_tensor *out, ctorch_tensor x, ctorch_tensor packed, ctorch_tensor bias, int64_t channels,
                           int64_t groups, ctorch_tensor gain, ctorch_tensor offset, double eps, ctorch_tensor addend) {
  return guarded([&] {
    *out = wrap(chunkgrpo::convolution(unwrap(x), unwrap(packed), optional(bias), channels,
                                       {groups, optional(gain), optional(offset), eps}, optional(addend)));
  });
}
int64_t ctorch_version(ctorch_tensor t) { return int64_t(unwrap(t)._version()); }

}  // extern "C"
