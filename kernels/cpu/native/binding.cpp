// The Python module farshore.kernels.cpu._native. Pointers and strides come as integers from the launchers in
// kernels/cpu/__init__.py, which check shapes and dtypes and keep the memory alive; nothing here knows PyTorch.

#include "runtime/binding.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "runtime/api.h"
#include "runtime/pool.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace farshore;

namespace {

// -- what this machine has ---------------------------------------------------------------------------------

struct Choice {
    const Kernels* kernels;
    bool usable;
};

#if defined(__x86_64__)
bool amx_granted() {
#if defined(__linux__)
    // A process has no tiles until it asks for their state (Linux, Documentation/arch/x86/xstate.rst).
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

// Best first.
std::vector<Choice> choices() {
    std::vector<Choice> all;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    all.push_back({&amx_kernels(), bf16 && amx_granted()});
    // On Intel's a bfloat16 dot product takes four times as long as the multiply-add of half as many floats.
    // (Sapphire Rapids: 0.70 against 0.17 ns; extend is 25 to 35% faster without it.)
    const bool fast_dot = !__builtin_cpu_is("intel");
    if (fast_dot) all.push_back({&avx512_bf16_kernels(), bf16});
    all.push_back({&avx512_kernels(), avx512});
    if (!fast_dot) all.push_back({&avx512_bf16_kernels(), bf16});
    all.push_back({&avx2_kernels(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
    all.push_back({&portable_kernels(), true});
    return all;
}

const Kernels* chosen = nullptr;

Plan* plan_of(PyObject* capsule) {
    void* it = PyCapsule_GetPointer(capsule, PLAN_CAPSULE);
    if (!it) throw std::runtime_error("not a plan");
    return static_cast<Plan*>(it);
}

// -- functions ---------------------------------------------------------------------------------------------

PyObject* make_plan(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        auto plan = std::make_unique<Plan>();
        plan->shape = a.shape();
        plan->format = static_cast<Format>(a.small());
        plan->v_in_k = a.small();
        plan->window = a.window();
        plan->block_tokens = a.small();
        plan->k_row_bytes = a.integer();
        plan->v_row_bytes = a.integer();
        plan->k_run_bytes = a.integer();
        plan->v_run_bytes = a.integer();
        plan->k_scales = a.small();
        plan->v_scales = a.small();
        plan->memory = a.pointer<const uint8_t>();
        plan->rows = a.small();
        plan->groups = a.small();
        plan->threads = a.small();
        const int64_t* positions = a.pointer<const int64_t>();
        plan->positions.assign(positions, positions + plan->rows);
        WorkList work;
        work.items = a.small();
        work.row = a.pointer<const int32_t>();
        work.rows = a.pointer<const int32_t>();
        work.segment = a.pointer<const int32_t>();
        work.group0 = a.pointer<const int16_t>();
        work.group1 = a.pointer<const int16_t>();
        work.base = a.pointer<const int64_t>();
        work.stride = a.pointer<const int64_t>();
        work.first = a.pointer<const int32_t>();
        work.count = a.pointer<const int32_t>();
        work.position = a.pointer<const int32_t>();
        work.stored0 = a.pointer<const int16_t>();
        work.stored1 = a.pointer<const int16_t>();
        work.group0_of_q = a.small();
        lay_out(*plan, work);
        return PyCapsule_New(plan.release(), PLAN_CAPSULE, [](PyObject* capsule) {
            delete static_cast<Plan*>(PyCapsule_GetPointer(capsule, PLAN_CAPSULE));
        });
    });
}

// One call of `partial`, its arguments checked.
struct Partial {
    Plan* plan;
    int layer;
    RowArray q;
    StateArray out;

    void run() const { chosen->partial(*plan, layer, q, out); }
};

Partial partial_of(PyObject* const* args, Py_ssize_t count) {
    if (count < 1) throw std::runtime_error("too few arguments");
    Partial it;
    it.plan = plan_of(args[0]);
    Arguments a{args + 1, args + count};
    it.layer = a.small();
    const int64_t heads = static_cast<int64_t>(it.plan->groups) * it.plan->shape.q_heads;
    it.q = a.rows("q", it.plan->rows, heads, it.plan->shape.k_dim);
    it.out = a.state(it.plan->rows, heads, it.plan->shape.v_dim);
    return it;
}

PyObject* run_partial(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        const Partial it = partial_of(args, count);
        {
            WithoutGil released;
            it.run();
        }
        Py_RETURN_NONE;
    });
}

PyObject* offer_partial(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        thread_local Partial offered;
        complete();
        offered = partial_of(args, count);
        offer([](void* it, int) { static_cast<const Partial*>(it)->run(); }, &offered);
        Py_RETURN_NONE;
    });
}

PyObject* complete_partial(PyObject*, PyObject* const*, Py_ssize_t) {
    return guarded([&]() -> PyObject* {
        {
            WithoutGil released;
            complete();
        }
        Py_RETURN_NONE;
    });
}

void run_contiguous(void* capsule_content, int layer, const void* q, int format, void* o, float* lse) {
    Plan& plan = *static_cast<Plan*>(capsule_content);
    const int64_t heads = static_cast<int64_t>(plan.groups) * plan.shape.q_heads;
    const int64_t k_dim = plan.shape.k_dim, v_dim = plan.shape.v_dim;
    const auto kind = static_cast<Format>(format);
    const StateArray out{{o, heads * v_dim, v_dim, kind}, lse, heads, 1};
    chosen->partial(plan, layer, {const_cast<void*>(q), heads * k_dim, k_dim, kind}, out);
}

const Api api{run_contiguous, wait_awake, give_way};

PyObject* run_extend(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        ExtendArguments e{};
        e.shape = a.shape();
        e.groups = a.small();
        e.format = static_cast<Format>(a.small());
        e.window = a.window();
        e.tokens.k = a.pointer<const uint8_t>();
        e.tokens.k_stride = a.integer();
        e.tokens.k_head_stride = a.integer();
        e.tokens.v = a.pointer<const uint8_t>();
        e.tokens.v_stride = a.integer();
        e.tokens.v_head_stride = a.integer();
        e.tokens.count = a.small();
        e.tokens.position = a.integer();
        e.k_group_stride = e.shape.k_heads * e.tokens.k_head_stride;
        e.v_group_stride = e.shape.v_heads * e.tokens.v_head_stride;
        e.rows = a.small();
        e.positions = a.pointer<const int64_t>();
        e.threads = a.small();
        const RowArray q = a.array();
        const StateArray out = a.out();
        {
            WithoutGil released;
            chosen->extend(e, q, out);
        }
        Py_RETURN_NONE;
    });
}

// merge(states, sink, o, lse): states a sequence of pairs (o, lse).
PyObject* run_merge(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        if (count != 4) throw std::runtime_error("states, sink, o and lse");
        const Owned states{PySequence_Fast(args[0], "states must be a sequence")};
        if (!states.it) throw std::runtime_error("states");
        MergeArguments m;
        m.count = static_cast<int>(PySequence_Fast_GET_SIZE(states.it));
        if (m.count < 1) throw std::invalid_argument("merge of no states: give 1 or more");
        const View shape = view_of(args[2], "o");
        if (shape.dims != 3) throw std::invalid_argument("o must be [rows, heads, v_dim]");
        m.rows = static_cast<int>(shape.shape[0]);
        m.heads = static_cast<int>(shape.shape[1]);
        m.v_dim = static_cast<int>(shape.shape[2]);
        Arguments outs{args + 2, args + 4};
        const StateArray out = outs.state(m.rows, m.heads, m.v_dim);
        // Kept from call to call: a merge allocates nothing.
        thread_local std::vector<StateArray> parts;
        parts.resize(m.count);
        for (int i = 0; i < m.count; i++) {
            const Owned pair{PySequence_Fast(PySequence_Fast_GET_ITEM(states.it, i), "a state is (o, lse)")};
            if (!pair.it || PySequence_Fast_GET_SIZE(pair.it) != 2) throw std::invalid_argument("a state is (o, lse)");
            PyObject* const* items = PySequence_Fast_ITEMS(pair.it);
            Arguments one{items, items + 2};
            parts[i] = one.state(m.rows, m.heads, m.v_dim);
        }
        m.states = parts.data();
        m.sink = nullptr;
        if (args[1] != Py_None) {
            const View sink = view_of(args[1], "sink");
            if (sink.dims != 1 || sink.shape[0] != m.heads || sink.strides[0] != 1 || sink.format != Format::f32)
                throw std::invalid_argument("a sink of another shape: give contiguous float32 [" + std::to_string(m.heads) + "]");
            m.sink = static_cast<const float*>(sink.data);
        }
        {
            WithoutGil released;
            chosen->merge(m, out);
        }
        Py_RETURN_NONE;
    });
}

PyObject* instruction_sets(PyObject*, PyObject* const*, Py_ssize_t) {
    PyObject* names = PyList_New(0);
    for (const Choice& choice : choices())
        if (choice.usable) {
            PyObject* name = PyUnicode_FromString(choice.kernels->name);
            PyList_Append(names, name);
            Py_DECREF(name);
        }
    return names;
}

PyObject* use(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        const char* name = count == 1 ? PyUnicode_AsUTF8(args[0]) : nullptr;
        for (const Choice& choice : choices())
            if (name && choice.usable && std::string(name) == choice.kernels->name) {
                chosen = choice.kernels;
                Py_RETURN_NONE;
            }
        throw std::runtime_error("this machine has no such instruction set");
    });
}

PyObject* use_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        if (count != 3) throw std::runtime_error("the type, the capsule or None, and describe");
        set_tensors(args[0], args[1], args[2]);
        Py_RETURN_NONE;
    });
}

PyMethodDef methods[] = {
    method("plan", make_plan, "Lay out a step's work; returns a capsule."),
    method("partial", run_partial, "partial(plan, layer, q, o, lse)"),
    method("offer", offer_partial, "As partial, by a thread that waits awake, if there is one; see complete."),
    method("complete", complete_partial, "complete(): what was offered is done."),
    method("extend", run_extend, "Causal attention on plain keys."),
    method("merge", run_merge, "merge(states, sink, o, lse): in the order given."),
    method("use_tensors", use_tensors, "How tensors are read: see tensors.h."),
    method("instruction_sets", instruction_sets, "Names of those this machine has, best first."),
    method("use", use, "Choose one by name; the best is chosen at import. For tests."),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module{
    PyModuleDef_HEAD_INIT, "_native", "Native CPU kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

const Kernels& farshore::kernels() { return *chosen; }

PyMODINIT_FUNC PyInit__native() {
    for (const Choice& choice : choices())
        if (choice.usable && !chosen) chosen = choice.kernels;
    PyObject* made = PyModule_Create(&module);
    if (!made) return nullptr;
    PyObject* capsule = PyCapsule_New(const_cast<Api*>(&api), API_CAPSULE, nullptr);
    if (!capsule || PyModule_AddObject(made, "api", capsule) < 0) {
        Py_XDECREF(capsule);
        Py_DECREF(made);
        return nullptr;
    }
    if (PyModule_AddFunctions(made, dense_methods) < 0) Py_CLEAR(made);
    return made;
}
