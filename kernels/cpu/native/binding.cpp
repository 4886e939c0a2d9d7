// The Python module farshore.kernels.cpu._native: attention. Called by the launchers in kernels/cpu/attention.py, which
// check shapes against the model and keep tensors alive while a plan points into them. dense/binding.cpp defines the
// module's other functions. Nothing here links PyTorch.

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "runtime/api.h"
#include "runtime/binding.h"
#include "runtime/gil.h"
#include "runtime/pool.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace farshore;

namespace {

// -- instruction sets --------------------------------------------------------------------------------------

struct InstructionSet {
    const Kernels* kernels;
    bool usable;
};

#if defined(__x86_64__)
bool amx_granted() {
#if defined(__linux__)
    // A process must ask the kernel for the tiles' state before it may use tiles (Linux,
    // Documentation/arch/x86/xstate.rst).
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

// Fastest first.
std::vector<InstructionSet> known_sets() {
    std::vector<InstructionSet> sets;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    sets.push_back({&amx_kernels(), bf16 && amx_granted()});
    // On Intel CPUs a bfloat16 dot product takes four times as long as the multiply-add of half as many floats.
    // (Sapphire Rapids: 0.70 against 0.17 ns; extend is 25 to 35% faster without it.)
    const bool fast_dot = !__builtin_cpu_is("intel");
    if (fast_dot) sets.push_back({&avx512_bf16_kernels(), bf16});
    sets.push_back({&avx512_kernels(), avx512});
    if (!fast_dot) sets.push_back({&avx512_bf16_kernels(), bf16});
    sets.push_back({&avx2_kernels(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
    sets.push_back({&portable_kernels(), true});
    return sets;
}

const Kernels* in_use = nullptr;

PyObject* instruction_sets(Arguments& arguments) {
    arguments.end();
    Reference names = Reference::owned(PyList_New(0));
    for (const InstructionSet& set : known_sets()) {
        if (!set.usable) continue;
        const Reference name = Reference::owned(PyUnicode_FromString(set.kernels->name));
        if (PyList_Append(names.get(), name.get()) != 0) throw PythonError();
    }
    return names.release();
}

void use(Arguments& arguments) {
    const char* name = PyUnicode_AsUTF8(arguments.object("instruction_set"));
    if (!name) throw PythonError();
    arguments.end();
    for (const InstructionSet& set : known_sets())
        if (set.usable && std::string(name) == set.kernels->name) {
            in_use = set.kernels;
            return;
        }
    throw std::runtime_error("this machine has no such instruction set");
}

void use_tensors(Arguments& arguments) {
    PyObject* type = arguments.object("type");
    PyObject* capsule = arguments.object("exchange_api");
    PyObject* describe = arguments.object("describe");
    arguments.end();
    set_tensors(type, capsule, describe);
}

// -- plan --------------------------------------------------------------------------------------------------

Shape shape_of(Arguments& arguments) {
    Arguments items = arguments.items("shape");
    Shape shape;
    shape.q_heads = items.integer<int>("q_heads", 1);
    shape.k_heads = items.integer<int>("k_heads", 1);
    shape.v_heads = items.integer<int>("v_heads", 1);
    shape.k_dim = items.integer<int>("k_dim", 1);
    shape.v_dim = items.integer<int>("v_dim", 1);
    shape.scale = static_cast<float>(items.real("scale"));
    shape.soft_cap = static_cast<float>(items.real("soft_cap"));
    items.end();
    return shape;
}

// 0 stands for no window.
int64_t window_of(Arguments& arguments) {
    const auto tokens = arguments.integer<int64_t>("window_tokens", 0);
    return tokens > 0 ? tokens : INT64_MAX;
}

void read_layout(Arguments& arguments, Plan& plan) {
    Arguments items = arguments.items("layout");
    plan.format = items.choice("format", Format::i4);
    plan.v_in_k = items.boolean("v_in_k");
    plan.block_tokens = items.integer<int>("block_tokens", 1);
    plan.k_row_bytes = items.integer<int64_t>("k_row_bytes", 0);
    plan.v_row_bytes = items.integer<int64_t>("v_row_bytes", 0);
    plan.k_run_bytes = items.integer<int64_t>("k_run_bytes", 0);
    plan.v_run_bytes = items.integer<int64_t>("v_run_bytes", 0);
    plan.k_scales = items.count("k_scales");
    plan.v_scales = items.count("v_scales");
    items.end();
}

// The columns of kernels/base.py's WorkList and Segments, in their order.
void read_work(Arguments& arguments, WorkList& work) {
    Arguments rows = arguments.items("rows");
    PyObject* row = rows.object("row");
    work.items = static_cast<int>(contiguous_view(row, "rows.row", Element::i32, 1).shape[0]);
    work.row = vector_of<int32_t>(row, "rows.row", work.items);
    work.rows = vector_of<int32_t>(rows.object("rows"), "rows.rows", work.items);
    work.segment = vector_of<int32_t>(rows.object("segment"), "rows.segment", work.items);
    work.group0 = vector_of<int16_t>(rows.object("group0"), "rows.group0", work.items);
    work.group1 = vector_of<int16_t>(rows.object("group1"), "rows.group1", work.items);
    rows.end();
    Arguments segments = arguments.items("segments");
    PyObject* base = segments.object("base");
    const int64_t count = contiguous_view(base, "segments.base", Element::i64, 1).shape[0];
    work.base = vector_of<int64_t>(base, "segments.base", count);
    work.stride = vector_of<int64_t>(segments.object("stride"), "segments.stride", count);
    work.first = vector_of<int32_t>(segments.object("first"), "segments.first", count);
    work.count = vector_of<int32_t>(segments.object("count"), "segments.count", count);
    work.position = vector_of<int32_t>(segments.object("position"), "segments.position", count);
    work.stored0 = vector_of<int16_t>(segments.object("group0"), "segments.group0", count);
    work.stored1 = vector_of<int16_t>(segments.object("group1"), "segments.group1", count);
    segments.end();
}

PyObject* make_plan(Arguments& arguments) {
    auto plan = std::make_unique<Plan>();
    plan->shape = shape_of(arguments);
    read_layout(arguments, *plan);
    plan->window = window_of(arguments);
    plan->memory =
        static_cast<const uint8_t*>(contiguous_view(arguments.object("memory"), "memory", Element::u8, 1).data);
    const View positions = contiguous_view(arguments.object("positions"), "positions", Element::i64, 1);
    const auto* first = static_cast<const int64_t*>(positions.data);
    plan->positions.assign(first, first + positions.shape[0]);
    plan->rows = static_cast<int>(positions.shape[0]);
    WorkList work;
    read_work(arguments, work);
    work.group0_of_q = arguments.count("group0");
    plan->groups = arguments.count("groups");
    plan->threads = arguments.integer<int>("threads");
    arguments.end();
    lay_out(*plan, work);
    return capsule_of(std::move(plan), PLAN_CAPSULE);
}

// -- partial, extend, merge --------------------------------------------------------------------------------

// One call of `partial`, its arguments checked.
struct PartialCall {
    Plan* plan;
    int layer;
    RowArray q;
    StateArray out;

    void run() const { in_use->partial(*plan, layer, q, out); }
};

PartialCall partial_call(Arguments& arguments) {
    PartialCall call;
    call.plan = &arguments.content<Plan>("plan", PLAN_CAPSULE);
    call.layer = arguments.count("layer");
    PyObject* q = arguments.object("q");
    PyObject* o = arguments.object("o");
    PyObject* lse = arguments.object("lse");
    arguments.end();
    const int64_t heads = static_cast<int64_t>(call.plan->groups) * call.plan->shape.q_heads;
    call.q = rows_of(q, "q", call.plan->rows, heads, call.plan->shape.k_dim);
    call.out = state_of(o, lse, call.plan->rows, heads, call.plan->shape.v_dim);
    return call;
}

void run_partial(Arguments& arguments) {
    const PartialCall call = partial_call(arguments);
    without_gil([&] { call.run(); });
}

void run_partial_async(Arguments& arguments) {
    thread_local PartialCall started;
    wait_async();  // before `started` changes
    started = partial_call(arguments);
    start_async([](void* call, int) { static_cast<const PartialCall*>(call)->run(); }, &started);
}

void run_wait(Arguments& arguments) {
    arguments.end();
    without_gil([] { wait_async(); });
}

// `partial` of runtime/api.h.
void run_contiguous(void* plan_content, int layer, const void* q, int format, void* o, float* lse) {
    Plan& plan = *static_cast<Plan*>(plan_content);
    const int64_t heads = static_cast<int64_t>(plan.groups) * plan.shape.q_heads;
    const int64_t k_dim = plan.shape.k_dim, v_dim = plan.shape.v_dim;
    const auto type = static_cast<Format>(format);
    const StateArray out{{o, heads * v_dim, v_dim, type}, lse, heads, 1};
    in_use->partial(plan, layer, {const_cast<void*>(q), heads * k_dim, k_dim, type}, out);
}

// K or V [heads, keys, dim], the last dimension contiguous; strides in bytes.
struct Keys {
    const uint8_t* data;
    int64_t token_stride, head_stride;
    Format format;
    int64_t heads, count;
};

Keys keys_of(PyObject* tensor, const char* name, int64_t dim) {
    const View view = float_view(tensor, name);
    if (view.dims != 3) throw std::invalid_argument(std::string(name) + " must be [heads, keys, dim]");
    const RowArray rows = rows_of(tensor, name, view.shape[0], view.shape[1], dim);
    const int64_t bytes = rows.format == Format::f32 ? 4 : 2;
    Keys keys;
    keys.data = static_cast<const uint8_t*>(rows.data);
    keys.token_stride = rows.head_stride * bytes, keys.head_stride = rows.row_stride * bytes;
    keys.format = rows.format;
    keys.heads = view.shape[0], keys.count = view.shape[1];
    return keys;
}

void run_extend(Arguments& arguments) {
    ExtendArguments e{};
    e.shape = shape_of(arguments);
    e.groups = arguments.count("groups");
    e.window = window_of(arguments);
    PyObject* q_tensor = arguments.object("q");
    const Keys k = keys_of(arguments.object("k"), "k", e.shape.k_dim);
    const Keys v = keys_of(arguments.object("v"), "v", e.shape.v_dim);
    e.tokens.position = arguments.integer<int64_t>("k_position");
    const View positions = contiguous_view(arguments.object("q_positions"), "q_positions", Element::i64, 1);
    PyObject* o = arguments.object("o");
    PyObject* lse = arguments.object("lse");
    e.threads = arguments.integer<int>("threads");
    arguments.end();
    if (k.heads != e.groups * int64_t{e.shape.k_heads} || v.heads != e.groups * int64_t{e.shape.v_heads} ||
        k.count != v.count || k.count > INT32_MAX || k.format != v.format)
        throw std::invalid_argument("k and v: give one dtype, the groups' heads and equal numbers of keys");
    e.format = k.format;
    e.tokens.k = k.data, e.tokens.k_stride = k.token_stride, e.tokens.k_head_stride = k.head_stride;
    e.tokens.v = v.data, e.tokens.v_stride = v.token_stride, e.tokens.v_head_stride = v.head_stride;
    e.tokens.count = static_cast<int>(k.count);
    e.k_group_stride = e.shape.k_heads * k.head_stride;
    e.v_group_stride = e.shape.v_heads * v.head_stride;
    e.rows = static_cast<int>(positions.shape[0]);
    e.positions = static_cast<const int64_t*>(positions.data);
    const int64_t heads = int64_t{e.groups} * e.shape.q_heads;
    const RowArray q = rows_of(q_tensor, "q", e.rows, heads, e.shape.k_dim);
    const StateArray out = state_of(o, lse, e.rows, heads, e.shape.v_dim);
    without_gil([&] { in_use->extend(e, q, out); });
}

StateArray item_state(PyObject* item, const MergeArguments& m) {
    const Reference pair = Reference::owned(PySequence_Fast(item, "a state is (o, lse)"));
    if (PySequence_Fast_GET_SIZE(pair.get()) != 2) throw std::invalid_argument("a state is (o, lse)");
    PyObject* const* tensors = PySequence_Fast_ITEMS(pair.get());
    return state_of(tensors[0], tensors[1], m.rows, m.heads, m.v_dim);
}

const float* sink_of(PyObject* tensor, int heads) {
    if (tensor == Py_None) return nullptr;
    const View sink = float_view(tensor, "sink");
    if (sink.dims != 1 || sink.shape[0] != heads || sink.strides[0] != 1 || sink.format() != Format::f32)
        throw std::invalid_argument("a sink of another shape: give contiguous float32 [" + std::to_string(heads) + "]");
    return static_cast<const float*>(sink.data);
}

void run_merge(Arguments& arguments) {
    const Reference states = Reference::owned(PySequence_Fast(arguments.object("states"), "states must be a sequence"));
    PyObject* sink = arguments.object("sink");
    PyObject* o = arguments.object("o");
    PyObject* lse = arguments.object("lse");
    arguments.end();
    MergeArguments m;
    m.count = static_cast<int>(PySequence_Fast_GET_SIZE(states.get()));
    if (m.count < 1) throw std::invalid_argument("merge of no states: give 1 or more");
    const View shape = float_view(o, "o");
    if (shape.dims != 3) throw std::invalid_argument("o must be [rows, heads, v_dim]");
    m.rows = static_cast<int>(shape.shape[0]);
    m.heads = static_cast<int>(shape.shape[1]);
    m.v_dim = static_cast<int>(shape.shape[2]);
    const StateArray out = state_of(o, lse, m.rows, m.heads, m.v_dim);
    // Kept from call to call, so that merge allocates nothing.
    thread_local std::vector<StateArray> inputs;
    inputs.resize(m.count);
    for (int i = 0; i < m.count; i++) inputs[i] = item_state(PySequence_Fast_GET_ITEM(states.get(), i), m);
    m.states = inputs.data();
    m.sink = sink_of(sink, m.heads);
    without_gil([&] { in_use->merge(m, out); });
}

// -- module ------------------------------------------------------------------------------------------------

const Api api{run_contiguous, set_spin_us, give_way};

PyMethodDef methods[] = {
    method<"plan", make_plan>(
        "plan(shape, layout, window_tokens, memory, positions, rows, segments, group0, groups, threads)\n\n"
        "Makes the kernel plan of a step and returns it as a capsule. shape: (q_heads, k_heads, v_heads, k_dim, v_dim,"
        " scale, soft_cap), heads per group, soft_cap 0 for none. layout: (format, v_in_k, block_tokens, k_row_bytes,"
        " v_row_bytes, k_run_bytes, v_run_bytes, k_scales, v_scales). window_tokens: 0 for none. memory u8 must outlive"
        " the plan. positions i64[query rows]. rows, segments: the columns of kernels/base.py. The plan's query rows"
        " hold `groups` groups from group0."),
    method<"partial", run_partial>("partial(plan, layer, q, o, lse)\n\nWrites the attention state of one layer."),
    method<"partial_async", run_partial_async>(
        "partial_async(plan, layer, q, o, lse)\n\n"
        "Starts partial on a thread that waits busily, if there is one. The result is there after wait()."),
    method<"wait", run_wait>(
        "wait()\n\nWaits for this thread's last partial_async; computes it here if no thread took it."),
    method<"extend", run_extend>(
        "extend(shape, groups, window_tokens, q, k, v, k_position, q_positions, o, lse, threads)\n\n"
        "Causal attention of q [rows, heads, k_dim] on k, v [heads, keys, dim], the first key at k_position."),
    method<"merge", run_merge>("merge(states, sink, o, lse)\n\n"
                               "Merges the states (o, lse) in the order given. sink: float32 [heads], or None."),
    method<"use_tensors", use_tensors>(
        "use_tensors(type, exchange_api, describe)\n\nSets how tensors are read: set_tensors in runtime/tensors.h."),
    method<"instruction_sets", instruction_sets>(
        "instruction_sets()\n\nThe names of those that this machine has, fastest first."),
    method<"use", use>("use(instruction_set)\n\nReplaces the one chosen at import, the fastest. For tests."),
    NO_MORE_METHODS,
};

PyModuleDef definition = module_definition("Native CPU kernels.", methods);

}  // namespace

const Kernels& farshore::kernels() { return *in_use; }

PyMODINIT_FUNC PyInit__native() {
    for (const InstructionSet& set : known_sets())
        if (set.usable && !in_use) in_use = set.kernels;
    return make_module(definition, [](PyObject* module) {
        const Reference capsule = Reference::owned(PyCapsule_New(const_cast<Api*>(&api), API_CAPSULE, nullptr));
        if (PyModule_AddObjectRef(module, "api", capsule.get()) < 0) throw PythonError();
        if (PyModule_AddFunctions(module, dense_methods) < 0) throw PythonError();
    });
}
