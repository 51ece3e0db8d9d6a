// sagecompile's ops on CPU tensors without Python: attention.cpp's kernel for what it can run.
//
// In: the arguments of an op. Out: its result. All else, also what is wrong, goes to Python, by the op of the same name
// with `_in_python` behind it. Why: Python takes the host 35 us for a call in a loop and 85 in a model, whose other code
// drives it out of the caches; SDPA of short sequences takes less.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace {

int (*kernel)(void* q, void* k, void* v, void* out, const int64_t* sizes, float scale, int64_t* exact, const char* site,
              int64_t letters);

constexpr int64_t MAX_HEAD_DIM = 256;

int64_t number_of(at::ScalarType dtype) {
    return dtype == at::kFloat ? 0 : dtype == at::kBFloat16 ? 1 : dtype == at::kHalf ? 2 : -1;
}

bool is_plain(const at::Tensor& x) {
    return x.dim() == 4 && x.layout() == c10::kStrided && !(x.requires_grad() && at::GradMode::is_enabled());
}

bool can_run(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::string_view format,
             std::string_view provider) {
    return kernel && provider == "cpu" && format == "qk_int8_pv_fp16" && is_plain(q) && is_plain(k) && is_plain(v) &&
           number_of(q.scalar_type()) >= 0 && q.scalar_type() == k.scalar_type() &&
           q.scalar_type() == v.scalar_type() && k.sizes() == v.sizes() && q.size(0) == k.size(0) &&
           q.size(3) == k.size(3) && q.size(3) <= MAX_HEAD_DIM && q.numel() > 0 && k.numel() > 0 &&
           q.size(1) % k.size(1) == 0;
}

// Leaves to Python the heads that INT8 cannot hold.
void mend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, at::Tensor exact_rows,
          double scale, std::optional<int64_t> ahead) {
    using Exact = void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                       double, std::optional<int64_t>);
    static const auto exact =
        c10::Dispatcher::singleton().findSchemaOrThrow("sagecompile::exact_heads_in_python", "").typed<Exact>();
    exact.call(q, k, v, out, exact_rows, scale, ahead);
}

// False where there is no memory.
bool attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, double scale,
            std::optional<int64_t> ahead, std::string_view site) {
    const int64_t all = k.size(2), most = std::min(ahead.value_or(all), all);
    int64_t sizes[9 + 16] = {q.size(0), q.size(1), q.size(2), q.size(3), k.size(1), k.size(2),
                             most, number_of(q.scalar_type()), at::get_num_threads()};
    int64_t* strides = sizes + 9;
    for (const at::Tensor* x : {&q, &k, &v, &out}) strides = std::copy(x->strides().begin(), x->strides().end(), strides);
    std::vector<int64_t> exact(q.size(0) * q.size(1));
    const auto data = [](const at::Tensor& x) { return const_cast<void*>(x.const_data_ptr()); };
    if (kernel(data(q), data(k), data(v), out.mutable_data_ptr(), sizes, static_cast<float>(scale), exact.data(),
               site.data(), static_cast<int64_t>(site.size())) != 0)
        return false;
    if (std::any_of(exact.begin(), exact.end(), [](int64_t rows) { return rows < 0; }))
        mend(q, k, v, out, at::from_blob(exact.data(), {q.size(0), q.size(1)}, at::kLong), scale, ahead);
    return true;
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::optional<double> scale,
                     std::optional<int64_t> ahead, std::optional<int64_t> behind, const std::optional<at::Tensor>& low,
                     const std::optional<at::Tensor>& high, const std::optional<at::Tensor>& mask,
                     std::string_view format, std::string_view provider, bool tokens_first, std::string_view site) {
    const bool is_affine = !(behind || low || high || mask);
    if (is_affine && can_run(q, k, v, format, provider) && ahead.value_or(0) >= 0) {
        const int64_t heads = q.size(1), tokens = q.size(2), head_dim = q.size(3), all = heads * tokens * head_dim;
        const int64_t head = tokens_first ? head_dim : tokens * head_dim, token = tokens_first ? heads * head_dim : head_dim;
        const auto out = at::empty_strided(q.sizes(), {all, head, token, 1}, q.options());
        if (attend(q, k, v, out, scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))), ahead, site)) return out;
    }
    static const auto in_python = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("sagecompile::attention_in_python", "")
                                      .typed<decltype(attention)>();
    return in_python.call(q, k, v, scale, ahead, behind, low, high, mask, format, provider, tokens_first, site);
}

void attention_into(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, double scale,
                    std::optional<int64_t> ahead, std::optional<int64_t> behind, const std::optional<at::Tensor>& low,
                    const std::optional<at::Tensor>& high, const std::optional<at::Tensor>& mask,
                    std::string_view format, std::string_view provider, std::string_view site) {
    const bool can_write = !(behind || low || high || mask) && is_plain(out) && out.sizes() == q.sizes() && out.scalar_type() == q.scalar_type();
    if (can_write && ahead.value_or(0) >= 0 && can_run(q, k, v, format, provider) &&
        attend(q, k, v, out, scale, ahead, site)) {
        if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();  // for whoever saved it for a gradient
        return;
    }
    static const auto in_python = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("sagecompile::attention_into_in_python", "")
                                      .typed<decltype(attention_into)>();
    in_python.call(q, k, v, out, scale, ahead, behind, low, high, mask, format, provider, site);
}

}  // namespace

extern "C" void sagecompile_kernel(void* attention) { kernel = reinterpret_cast<decltype(kernel)>(attention); }

TORCH_LIBRARY_IMPL(sagecompile, CPU, library) {
    library.impl("attention", TORCH_FN(attention));
    library.impl("attention_into", TORCH_FN(attention_into));
}
