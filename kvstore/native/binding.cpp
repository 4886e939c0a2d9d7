// The Python module farshore.kvstore._native. Called by kvstore/store (blocks, tail, images, parity), which checks
// shapes and dtypes and keeps memory alive. Memory comes as addresses: nothing here knows PyTorch.

#include <memory>
#include <vector>

#include "bytes.h"
#include "copy.h"
#include "runtime/arguments.h"
#include "runtime/gil.h"
#include "runtime/module.h"

using namespace farshore;
using namespace farshore::kv;

namespace {

using kv::Format;

constexpr const char* APPEND_CAPSULE = "farshore.kvstore.append";

// (heads, dim, row_bytes, scales, run_bytes, offset).
Side side_of(Arguments& layout, const char* name) {
    Arguments items = layout.items(name);
    Side side;
    side.heads = items.count("heads");
    side.dim = items.count("dim");
    side.row_bytes = items.integer<int64_t>("row_bytes", 0);
    side.scales = items.count("scales");
    side.run_bytes = items.integer<int64_t>("run_bytes", 0);
    side.offset = items.integer<int64_t>("offset", 0);
    items.end();
    return side;
}

// layout: (format, block_tokens, layer_bytes, k, v). memory: the arena's address. blocks: for each range of tokens
// (offset of its block in the memory, first slot, tokens), all in one flat sequence.
StoredTokens stored_tokens(Arguments& arguments) {
    StoredTokens stored;
    {
        Arguments items = arguments.items("layout");
        stored.layout.format = items.choice("format", Format::FLOAT64);
        stored.layout.block_tokens = items.integer<int>("block_tokens", 1);
        stored.layout.layer_bytes = items.integer<int64_t>("layer_bytes", 0);
        stored.layout.k = side_of(items, "k");
        stored.layout.v = side_of(items, "v");
        items.end();
    }
    auto* memory = arguments.address<uint8_t>("memory");
    Arguments blocks = arguments.items("blocks");
    stored.blocks.reserve(blocks.left() / 3);
    while (blocks.left()) {
        BlockTokens range;
        range.block = memory + blocks.integer<int64_t>("base", 0);
        range.slot = blocks.integer<int>("slot", 0, stored.layout.block_tokens);
        range.count = blocks.integer<int>("tokens", 0, stored.layout.block_tokens - range.slot);
        stored.blocks.push_back(range);
    }
    return stored;
}

// (address, layer stride, head stride, token stride), strides in bytes.
TokenRows rows_of(Arguments& arguments, const char* name) {
    Arguments items = arguments.items(name);
    TokenRows rows;
    rows.data = items.address_or_null<uint8_t>("address");  // null: no rows
    rows.layer_stride = items.integer<int64_t>("layer_stride");
    rows.head_stride = items.integer<int64_t>("head_stride");
    rows.token_stride = items.integer<int64_t>("token_stride");
    items.end();
    return rows;
}

template <auto COPY>
void run_copy(Arguments& arguments) {
    const int first_layer = arguments.count("first_layer"), last_layer = arguments.count("last_layer");
    const int threads = arguments.integer<int>("threads");
    const auto type = arguments.choice("type", RowType::STORED);
    const TokenRows k = rows_of(arguments, "k"), v = rows_of(arguments, "v");
    const StoredTokens stored = stored_tokens(arguments);
    arguments.end();
    without_gil([&] { COPY(stored, first_layer, last_layer, type, k, v, threads); });
}

PyObject* make_append(Arguments& arguments) {
    auto step = std::make_unique<StepAppend>();
    Arguments tails = arguments.items("tails");
    while (tails.left()) {
        TailAppend tail;
        tail.marks = tails.address<int64_t>("marks");
        tail.freed = tail.marks[TailAppend::FREED];
        tail.first = tails.integer<int64_t>("first", 0);
        tail.last = tails.integer<int64_t>("last", tail.first);
        step->tails.push_back(tail);
    }
    step->tokens = stored_tokens(arguments);
    arguments.end();
    return capsule_of(std::move(step), APPEND_CAPSULE);
}

// Keeps the GIL: an append takes some 10 us, and taking the GIL back from another thread may take 5 ms. The GIL also
// keeps the tails' marks from changing meanwhile.
PyObject* run_append(Arguments& arguments) {
    const auto& step = arguments.content<StepAppend>("batch", APPEND_CAPSULE);
    const int layer = arguments.count("layer");
    const auto type = arguments.choice("type", RowType::STORED);
    const TokenRows k = rows_of(arguments, "k"), v = rows_of(arguments, "v");
    arguments.end();
    const int refused = append(step, layer, type, k, v);
    if (refused >= 0) return PyLong_FromLong(refused);
    Py_RETURN_NONE;
}

// Addresses of no bytes may be 0.
void run_xor(Arguments& arguments) {
    auto* to = arguments.address_or_null<uint8_t>("to");
    Arguments addresses = arguments.items("sources");
    std::vector<const uint8_t*> sources;
    while (addresses.left()) sources.push_back(addresses.address_or_null<const uint8_t>("source"));
    const auto bytes = arguments.integer<int64_t>("bytes", 0);
    arguments.end();
    without_gil([&] { exclusive_or(to, sources, bytes); });
}

void run_stream(Arguments& arguments) {
    auto* to = arguments.address_or_null<uint8_t>("to");
    const auto* from = arguments.address_or_null<const uint8_t>("from");
    const auto bytes = arguments.integer<int64_t>("bytes", 0);
    arguments.end();
    without_gil([&] {
        stream_copy(to, from, bytes);
        flush_streamed();
    });
}

// An argument out of range is a defect of the calling module, not of a request: RuntimeError, since ValueError would
// pass for the latter.
PyObject* defect_type(const std::exception& error) {
    PyObject* type = exception_type(error);
    return type == PyExc_ValueError ? PyExc_RuntimeError : type;
}

PyMethodDef methods[] = {
    method<"scatter", run_copy<scatter>, defect_type>(
        "scatter(first_layer, last_layer, threads, type, k, v, layout, memory, blocks)\n\n"
        "Copies rows into blocks. k, v: (address, layer stride, head stride, token stride). layout: (format,"
        " block_tokens, layer_bytes, k, v), k and v (heads, dim, row_bytes, scales, run_bytes, offset). blocks: flat"
        " (base, slot, tokens) of each range of tokens."),
    method<"gather", run_copy<gather>, defect_type>(
        "gather(first_layer, last_layer, threads, type, k, v, layout, memory, blocks)\n\nCopies rows out of blocks."),
    method<"batch", make_append, defect_type>(
        "batch(tails, layout, memory, blocks)\n\nPrepares the appends of a step and returns them as a capsule. tails:"
        " flat (address of the marks, first, last) of each tail."),
    method<"append", run_append, defect_type>(
        "append(batch, layer, type, k, v)\n\nWrites one layer. Returns None, or the index of the tail that refuses."),
    method<"xor", run_xor, defect_type>("xor(to, sources, bytes)\n\nAddresses. Writes the XOR of the sources."),
    method<"stream", run_stream, defect_type>("stream(to, from, bytes)\n\nCopies past the caches."),
    NO_MORE_METHODS,
};

PyModuleDef definition = module_definition("Copies of KV.", methods);

}  // namespace

PyMODINIT_FUNC PyInit__native() { return make_module(definition); }
