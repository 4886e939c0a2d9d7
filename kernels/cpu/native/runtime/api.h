// The C++ interface that the kernels' module offers to other native modules, in a capsule named `api` of the Python
// module. With it a loop without the GIL can run a kernel plan. It exposes neither PyTorch nor the plan's content.
#pragma once

namespace farshore {

constexpr const char* API_CAPSULE = "farshore.kernels.cpu._native.api";
// The kind of the capsule that `plan` of the module returns. It points to a Plan.
constexpr const char* PLAN_CAPSULE = "farshore.plan";

struct Api {
    // Partial attention of one layer, like `partial` of the module. q [rows, heads, k_dim], o [rows, heads, v_dim]
    // and lse [rows, heads] are contiguous. `format` of q and o: 0 float32, 1 bfloat16, 2 float16. A plan serves one
    // call at a time. May throw std::bad_alloc.
    void (*partial)(void* plan, int layer, const void* q, int format, void* o, float* lse);
    // See pool.h.
    void (*set_spin_us)(int microseconds);
    void (*give_way)();
};

}  // namespace farshore
