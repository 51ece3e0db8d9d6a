// The launches that Python made for a call of an op on CUDA, again, for other tensors alike.
//
// In: the arguments of an op, and what Python launched for such ones before: a `Plan`. Out: the op's result, or what its
// fourth argument holds if it returns nothing. What is not planned goes to Python, by the op of the same name with
// `_in_python` behind it, which may leave a plan.
// Tensors are alike if shape, strides, dtype, device and alignment to 16 bytes are, and the other arguments the same but
// for the last, the site's name: all sites share their plans, and Python says once for each where its calls are counted.
// Neither CUDA's headers nor its libraries are needed: the three functions of the driver and of torch are given.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#ifndef OPS  // tests have their own
#define OPS sagecompile
#define DEVICE CUDA
#endif

namespace {

// CUlaunchAttribute and CUlaunchConfig of cuda.h.
struct Attribute {
    int id;
    char pad[4];
    int value;
    char rest[60];
};
struct Config {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    const Attribute* attributes;
    unsigned attribute_count;
};
constexpr Attribute OVERLAP = {6, {}, 1, {}};  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

int (*launch_kernel)(const Config*, void* function, void** parameters, void** extra);  // cuLaunchKernelEx
int (*current_context)(void** context);                                                 // cuCtxGetCurrent
int (*current_stream)(int32_t device, void** stream);                                   // of torch

// What an address is of: the op's tensors by their place in its schema, then what a call makes, and its site's counts.
enum Tensors { OP_TENSORS = 7, OUT = OP_TENSORS, MADE, COUNTS = MADE + 3, ALL };
constexpr int64_t ALIGNMENT = 256;  // of what a call makes: the basis, the tiles and the flags, in one allocation

struct Address {
    uint32_t offset, tensor;
};

struct Launch {
    void* function;
    Config config;
    std::string bytes;                 // all parameters,
    std::vector<uint32_t> parameters;  // where each begins,
    std::vector<Address> addresses;    // and where addresses go
};

struct Plan {
    std::vector<Launch> launches;
    std::vector<int64_t> out_sizes, out_strides;
    int64_t made_bytes[COUNTS - MADE];
};
using Shared = std::shared_ptr<const Plan>;

using Key = std::vector<int64_t>;
struct Hash {
    size_t operator()(const Key& key) const {
        uint64_t hash = 1469598103934665603u;  // FNV-1a, by whole numbers
        for (int64_t number : key) hash = (hash ^ static_cast<uint64_t>(number)) * 1099511628211u;
        return hash ^ hash >> 32;
    }
};

constexpr size_t MOST_PLANS = 4096;  // when there are more, all are forgotten
std::shared_mutex mutex;
std::unordered_map<Key, Shared, Hash> plans;
std::unordered_map<Key, void*, Hash> counts;  // by device and site
thread_local Shared left;  // by Python, in the call that is under way

Shared find(const Key& key) {
    std::shared_lock lock(mutex);
    const auto found = plans.find(key);
    return found == plans.end() ? nullptr : found->second;
}

void remember(Key key, Shared plan) {
    std::unique_lock lock(mutex);
    if (plans.size() >= MOST_PLANS) plans.clear();
    plans[std::move(key)] = std::move(plan);
}

void add_tensor(const at::Tensor& x, Key& key) {
    key.push_back(x.dim());
    key.insert(key.end(), x.sizes().begin(), x.sizes().end());
    key.insert(key.end(), x.strides().begin(), x.strides().end());
    const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    key.insert(key.end(), {static_cast<int64_t>(x.scalar_type()), x.get_device(), aligned});
}

void add_string(const std::string& text, Key& key) {
    for (size_t i = 0; i <= text.size(); i += 8) {  // <=: "" is a number too, and the last one says where it ends
        char bytes[8] = {};
        int64_t number;
        std::memcpy(bytes, text.data() + i, std::min<size_t>(8, text.size() - i));
        std::memcpy(&number, bytes, 8);
        key.push_back(number);
    }
}

Key key_of_site(int64_t device, const std::string& site) {
    Key key = {device};
    add_string(site, key);
    return key;
}

void* find_counts(const at::Tensor& q, const std::string& site) {
    const Key key = key_of_site(q.get_device(), site);
    std::shared_lock lock(mutex);
    const auto found = counts.find(key);
    return found == counts.end() ? nullptr : found->second;
}

// What a plan depends on. Empty if there can be none: Python says what is wrong.
Key key_of(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
    Key key;
    key.reserve(96);
    key.push_back(reinterpret_cast<intptr_t>(&op.schema()));
    for (const auto& argument : arguments) {
        key.push_back(argument.isNone() ? 0 : argument.isTensor() ? 1 : argument.isString() ? 2 : 3);
        if (argument.isTensor()) {
            const auto& x = argument.toTensor();
            if (!x.defined() || x.layout() != c10::kStrided || (x.requires_grad() && at::GradMode::is_enabled())) return {};
            add_tensor(x, key);
        } else if (argument.isString()) {
            add_string(argument.toStringRef(), key);
        } else if (argument.isDouble()) {
            const double number = argument.toDouble();
            key.emplace_back();
            std::memcpy(&key.back(), &number, 8);
        } else if (argument.isBool() || argument.isInt()) {
            key.push_back(argument.isBool() ? argument.toBool() : argument.toInt());
        } else if (!argument.isNone()) {
            return {};
        }
    }
    return key;
}

at::Tensor run(const Plan& plan, c10::ArrayRef<c10::IValue> arguments, bool into, void* counts) {
    const auto& q = arguments[0].toTensor();
    const c10::DeviceGuard guard(q.device());
    const auto bytes = q.options().dtype(at::kByte);
    const auto out = into ? arguments[3].toTensor() : at::empty_strided(plan.out_sizes, plan.out_strides, q.options());
    int64_t begins[COUNTS - MADE], all = 0;
    for (int i = 0; i < COUNTS - MADE; i++) {
        begins[i] = all;
        all += (plan.made_bytes[i] + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    const auto made = at::empty({all}, bytes);
    void* addresses[ALL] = {};
    for (size_t i = 0; i < OP_TENSORS && i < arguments.size(); i++)
        if (arguments[i].isTensor()) addresses[i] = const_cast<void*>(arguments[i].toTensor().const_data_ptr());
    addresses[OUT] = out.mutable_data_ptr();
    for (int i = 0; i < COUNTS - MADE; i++) addresses[MADE + i] = static_cast<char*>(made.mutable_data_ptr()) + begins[i];
    addresses[COUNTS] = counts;
    void* stream = nullptr;
    TORCH_CHECK(current_stream(q.get_device(), &stream) == 0, "sagecompile: no current stream on ", q.device());
    for (const Launch& launch : plan.launches) {
        std::string parameters = launch.bytes;
        for (const Address& to : launch.addresses)
            std::memcpy(parameters.data() + to.offset, &addresses[to.tensor], sizeof(void*));
        std::vector<void*> pointers;
        pointers.reserve(launch.parameters.size());
        for (uint32_t offset : launch.parameters) pointers.push_back(parameters.data() + offset);
        Config config = launch.config;
        config.stream = stream;
        const int result = launch_kernel(&config, launch.function, pointers.data(), nullptr);
        TORCH_CHECK(result == 0, "sagecompile: a kernel could not be launched on ", q.device(), " (CUDA error ", result, ")");
    }
    return out;
}

void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const size_t count = op.schema().arguments().size();
    const auto arguments = torch::jit::last(*stack, count);
    void* context = nullptr;  // a thread that is new to CUDA has none; Python gets it one
    const bool can_launch = current_context && current_context(&context) == 0 && context;
    Key key = key_of(op, arguments.slice(0, count - 1));
    const Shared plan = can_launch && !key.empty() ? find(key) : nullptr;
    void* const counts = plan ? find_counts(arguments[0].toTensor(), arguments[count - 1].toStringRef()) : nullptr;
    if (counts) {
        const bool into = op.schema().returns().empty();
        auto out = run(*plan, arguments, into, counts);
        torch::jit::drop(*stack, count);
        if (!into)
            torch::jit::push(*stack, std::move(out));
        else if (!out.is_inference())
            out.unsafeGetTensorImpl()->bump_version();  // for whoever saved it for a gradient
        return;
    }
    left = nullptr;
    const auto in_python = op.schema().name() + "_in_python";
    c10::Dispatcher::singleton().findSchemaOrThrow(in_python.c_str(), "").callBoxed(stack);
    if (left && !key.empty()) remember(std::move(key), std::move(left));
    left = nullptr;
}

}  // namespace

extern "C" {

void sagecompile_functions(void* launch, void* context, void* stream) {
    launch_kernel = reinterpret_cast<decltype(launch_kernel)>(launch);
    current_context = reinterpret_cast<decltype(current_context)>(context);
    current_stream = reinterpret_cast<decltype(current_stream)>(stream);
}

// A plan without launches; `sagecompile_forget` frees it.
void* sagecompile_plan(const int64_t* out_sizes, const int64_t* out_strides, int dims, const int64_t* made) {
    return new std::shared_ptr<Plan>(new Plan{
        {}, {out_sizes, out_sizes + dims}, {out_strides, out_strides + dims}, {made[0], made[1], made[2]}});
}

void sagecompile_add(
    void* plan, void* function, unsigned blocks, unsigned threads, unsigned shared_bytes, int overlap,
    const char* bytes, uint32_t byte_count, const uint32_t* parameters, uint32_t parameter_count,
    const Address* addresses, uint32_t address_count
) {
    const Config config = {{blocks, 1, 1}, {threads, 1, 1}, shared_bytes, nullptr, &OVERLAP, overlap ? 1u : 0u};
    (*static_cast<std::shared_ptr<Plan>*>(plan))->launches.push_back({
        function, config, {bytes, byte_count},
        {parameters, parameters + parameter_count}, {addresses, addresses + address_count}});
}

// Where the calls of a site are counted on a device.
void sagecompile_count_at(int device, const char* site, void* address) {
    std::unique_lock lock(mutex);
    counts[key_of_site(device, site)] = address;
}

// For the op's call that is under way on this thread, and those like it.
void sagecompile_leave(void* plan) { left = *static_cast<std::shared_ptr<Plan>*>(plan); }

void sagecompile_forget(void* plan) { delete static_cast<std::shared_ptr<Plan>*>(plan); }

}  // extern "C"

TORCH_LIBRARY_IMPL(OPS, DEVICE, library) {
    library.impl("attention", torch::CppFunction::makeFromBoxedFunction<&call>());
    library.impl("qk_norm_rope_attention", torch::CppFunction::makeFromBoxedFunction<&call>());
    library.impl("attention_into", torch::CppFunction::makeFromBoxedFunction<&call>());
}
