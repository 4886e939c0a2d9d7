// What other native modules may call: a capsule `api` of the Python module, so that a loop without Python can
// run a step's plan. It knows neither PyTorch nor the plan's inside.
#pragma once

namespace farshore {

constexpr const char* API_CAPSULE = "farshore.kernels.cpu._native.api";
constexpr const char* PLAN_CAPSULE = "farshore.plan";  // what `plan` of the module returns; points to a plan

struct Api {
    // Partial attention of one layer, as `partial` of the module. q [rows, heads, k_dim], o [rows, heads, v_dim]
    // and lse [rows, heads], all contiguous; format (of q and o) 0: float32, 1: bfloat16, 2: float16. A plan
    // serves one call at a time. May throw std::bad_alloc.
    void (*partial)(void* plan, int layer, const void* q, int format, void* o, float* lse);
    // See pool.h.
    void (*wait_awake)(int microseconds);
    void (*give_way)();
};

}  // namespace farshore
