// The functions of farshore.kernels.cpu._native for dense work. Called by kernels/cpu/dense.py and packed.py, which
// check shapes against each other and keep tensors alive. The per-layer calls take addresses, since their callers
// prepare them once for all layers; all other functions take tensors.

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "dense/gguf.h"
#include "dense/dense.h"
#include "runtime/binding.h"
#include "runtime/gil.h"
#include "runtime/pool.h"

using namespace farshore;

namespace {

constexpr const char* LAYER_CAPSULE = "farshore.dense.layer";
constexpr const char* HEAD_CAPSULE = "farshore.dense.head";

// -- weights -----------------------------------------------------------------------------------------------

// A contiguous tensor of `dims` dimensions, in float32 or bfloat16; `format` is set by the first tensor that is read,
// and all others must have it.
View weights_of(Arguments& arguments, const char* name, int dims, std::optional<Format>& format) {
    PyObject* tensor = arguments.object(name);
    const std::string where = arguments.where(name);
    if (!format) {
        format = float_view(tensor, where.c_str()).format();
        if (*format == Format::f16) throw std::invalid_argument(where + ": give float32 or bfloat16");
    }
    return contiguous_view(tensor, where.c_str(), static_cast<Element>(*format), dims);
}

// A matrix as (weight [out, in], bias [out] or None, packed u8 [out, bytes] or None, storage of the packed form).
Linear linear_of(Arguments& arguments, const char* name, std::optional<Format>& format) {
    Arguments items = arguments.items(name);
    const View weight = weights_of(items, "weight", 2, format);
    Linear linear{};
    linear.weight = weight.data;
    linear.out = static_cast<int>(weight.shape[0]), linear.in = static_cast<int>(weight.shape[1]);
    PyObject* bias = items.object("bias");
    if (bias != Py_None) {
        const std::string where = items.where("bias");
        const View view = contiguous_view(bias, where.c_str(), static_cast<Element>(*format), 1);
        if (view.shape[0] != linear.out) throw std::invalid_argument(mismatch(where.c_str(), view, {linear.out}));
        linear.bias = view.data;
    }
    PyObject* packed = items.object("packed");
    linear.storage = items.choice("storage", Storage::q8);
    items.end();
    if ((packed == Py_None) != (linear.storage == Storage::none))
        throw std::invalid_argument(items.where("storage") + ": give it with packed rows, 0 without");
    if (packed != Py_None) {
        const std::string where = items.where("packed");
        const View view = contiguous_view(packed, where.c_str(), Element::u8, 2);
        if (view.shape[0] != linear.out)
            throw std::invalid_argument(mismatch(where.c_str(), view, {linear.out, view.shape[1]}));
        linear.packed = static_cast<const uint8_t*>(view.data);
    }
    return linear;
}

PyObject* make_layer(Arguments& arguments) {
    auto layer = std::make_unique<DecoderLayer>();
    std::optional<Format> format;
    layer->threads = arguments.integer<int>("threads");
    layer->eps = static_cast<float>(arguments.real("eps"));
    const View cos = weights_of(arguments, "cos", 2, format), sin = weights_of(arguments, "sin", 2, format);
    layer->format = *format;
    layer->positions = std::min(cos.shape[0], sin.shape[0]);
    layer->head_dim = static_cast<int>(2 * cos.shape[1]);
    layer->cos = cos.data, layer->sin = sin.data;
    layer->attention_norm = weights_of(arguments, "attention_norm", 1, format).data;
    layer->mlp_norm = weights_of(arguments, "mlp_norm", 1, format).data;
    layer->q = linear_of(arguments, "q", format);
    layer->k = linear_of(arguments, "k", format);
    layer->v = linear_of(arguments, "v", format);
    layer->o = linear_of(arguments, "o", format);
    layer->gate = linear_of(arguments, "gate", format);
    layer->up = linear_of(arguments, "up", format);
    layer->down = linear_of(arguments, "down", format);
    arguments.end();
    return capsule_of(std::move(layer), LAYER_CAPSULE);
}

PyObject* make_head(Arguments& arguments) {
    auto head = std::make_unique<LmHead>();
    std::optional<Format> format;
    head->threads = arguments.integer<int>("threads");
    head->eps = static_cast<float>(arguments.real("eps"));
    head->norm = weights_of(arguments, "norm", 1, format).data;
    head->format = *format;
    head->vocabulary = linear_of(arguments, "vocabulary", format);
    arguments.end();
    return capsule_of(std::move(head), HEAD_CAPSULE);
}

// -- a layer's slices --------------------------------------------------------------------------------------

// Raises IndexError for a position without a row in the rotation table.
void check_positions(const DecoderLayer& layer, const int64_t* positions, int rows) {
    for (int r = 0; r < rows; r++)
        if (positions[r] < 0 || positions[r] >= layer.positions)
            raise(PyExc_IndexError, "position %lld of %lld", static_cast<long long>(positions[r]),
                  static_cast<long long>(layer.positions));
}

void run_input(Arguments& arguments) {
    const auto& layer = arguments.content<DecoderLayer>("layer", LAYER_CAPSULE);
    const int rows = arguments.count("rows");
    const void* h = arguments.address<const void>("h");
    void* out = arguments.address<void>("out");
    arguments.end();
    without_gil([&] { kernels().dense.input(layer, h, rows, out); });
}

void run_query(Arguments& arguments) {
    const auto& layer = arguments.content<DecoderLayer>("layer", LAYER_CAPSULE);
    const int rows = arguments.count("rows");
    const void* normed = arguments.address<const void>("normed");
    const auto* positions = arguments.address<const int64_t>("positions");
    void* q = arguments.address<void>("q");
    arguments.end();
    check_positions(layer, positions, rows);
    without_gil([&] { kernels().dense.query(layer, normed, rows, positions, q); });
}

void run_key_value(Arguments& arguments) {
    const auto& layer = arguments.content<DecoderLayer>("layer", LAYER_CAPSULE);
    const int rows = arguments.count("rows");
    const void* normed = arguments.address<const void>("normed");
    const auto* positions = arguments.address<const int64_t>("positions");
    void* k = arguments.address<void>("k");
    void* v = arguments.address<void>("v");
    arguments.end();
    check_positions(layer, positions, rows);
    without_gil([&] { kernels().dense.key_value(layer, normed, rows, positions, k, v); });
}

void run_project(Arguments& arguments) {
    const auto& layer = arguments.content<DecoderLayer>("layer", LAYER_CAPSULE);
    const int rows = arguments.count("rows");
    const void* h = arguments.address<const void>("h");
    const auto* positions = arguments.address<const int64_t>("positions");
    void* q = arguments.address<void>("q");
    void* k = arguments.address<void>("k");
    void* v = arguments.address<void>("v");
    arguments.end();
    check_positions(layer, positions, rows);
    without_gil([&] { kernels().dense.project(layer, h, rows, positions, q, k, v); });
}

void run_finish(Arguments& arguments) {
    const auto& layer = arguments.content<DecoderLayer>("layer", LAYER_CAPSULE);
    const int rows = arguments.count("rows");
    const void* h = arguments.address<const void>("h");
    const void* o = arguments.address<const void>("o");
    void* out = arguments.address<void>("out");
    arguments.end();
    without_gil([&] { kernels().dense.finish(layer, h, o, rows, out); });
}

void run_logits(Arguments& arguments) {
    const auto& head = arguments.content<LmHead>("head", HEAD_CAPSULE);
    const int rows = arguments.count("rows");
    const void* h = arguments.address<const void>("h");
    float* out = arguments.address<float>("out");
    arguments.end();
    without_gil([&] { kernels().dense.logits(head, h, rows, out); });
}

// -- tables and files --------------------------------------------------------------------------------------

void run_gather(Arguments& arguments) {
    PyObject* table_tensor = arguments.object("table");
    const View ids = contiguous_view(arguments.object("ids"), "ids", Element::i64, 1);
    PyObject* out_tensor = arguments.object("out");
    arguments.end();
    const Element element = float_view(table_tensor, "table").element;
    const View table = contiguous_view(table_tensor, "table", element, 2);
    const View out = contiguous_view(out_tensor, "out", element, 2);
    if (out.shape[0] != ids.shape[0] || out.shape[1] != table.shape[1])
        throw std::invalid_argument(mismatch("out", out, {ids.shape[0], table.shape[1]}));
    const int64_t row_bytes = table.shape[1] * (element == Element::f32 ? 4 : 2);
    const auto* from = static_cast<const uint8_t*>(table.data);
    auto* to = static_cast<uint8_t*>(out.data);
    for (int64_t r = 0; r < ids.shape[0]; r++) {
        const int64_t id = static_cast<const int64_t*>(ids.data)[r];
        if (id < 0 || id >= table.shape[0])
            raise(PyExc_IndexError, "token id %lld of %lld", static_cast<long long>(id),
                  static_cast<long long>(table.shape[0]));
        std::memcpy(to + r * row_bytes, from + id * row_bytes, row_bytes);
    }
}

constexpr int BLOCK = 32;  // weights of a GGUF block

// u8 [rows, blocks, bytes of a block].
View blocks_of(Arguments& arguments) { return contiguous_view(arguments.object("blocks"), "blocks", Element::u8, 3); }

void run_unpack(Arguments& arguments) {
    const auto storage = arguments.choice("storage", Storage::q8);
    const View blocks = blocks_of(arguments);
    PyObject* tensor = arguments.object("values");
    const int threads = arguments.integer<int>("threads");
    arguments.end();
    const View values = contiguous_view(tensor, "values", float_view(tensor, "values").element, 2);
    if (values.element == Element::f16) throw std::invalid_argument("values: give float32 or bfloat16");
    if (values.shape[0] != blocks.shape[0] || values.shape[1] != BLOCK * blocks.shape[1])
        throw std::invalid_argument(mismatch("values", values, {blocks.shape[0], BLOCK * blocks.shape[1]}));
    without_gil([&] {
        unpack_blocks(storage, static_cast<const uint8_t*>(blocks.data), blocks.shape[0], blocks.shape[1],
                      values.format(), values.data, threads);
    });
}

void run_pack(Arguments& arguments) {
    const auto storage = arguments.choice("storage", Storage::q8);
    const View blocks = blocks_of(arguments);
    const View packed = contiguous_view(arguments.object("packed"), "packed", Element::u8, 2);
    const int threads = arguments.integer<int>("threads");
    arguments.end();
    if (packed.shape[0] != blocks.shape[0])
        throw std::invalid_argument(mismatch("packed", packed, {blocks.shape[0], packed.shape[1]}));
    without_gil([&] {
        pack_blocks(storage, static_cast<const uint8_t*>(blocks.data), blocks.shape[0], blocks.shape[1],
                    static_cast<uint8_t*>(packed.data), threads);
    });
}

void run_set_spin_us(Arguments& arguments) {
    const int microseconds = arguments.count("microseconds");
    arguments.end();
    set_spin_us(microseconds);
}

}  // namespace

PyMethodDef farshore::dense_methods[] = {
    method<"dense_layer", make_layer>(
        "dense_layer(threads, eps, cos, sin, attention_norm, mlp_norm, q, k, v, o, gate, up, down)\n\n"
        "Points to a decoder layer's weights and returns a capsule. cos, sin [positions, head_dim / 2]; norms [hidden];"
        " each matrix (weight, bias or None, packed rows or None, storage). All float32 or all bfloat16; contiguous;"
        " they must outlive the capsule."),
    method<"dense_head", make_head>(
        "dense_head(threads, eps, norm, vocabulary)\n\nThe last norm and the vocabulary's matrix, as dense_layer."),
    method<"dense_input", run_input>("dense_input(layer, rows, h, out)\n\nAddresses, as in all slices."),
    method<"dense_query", run_query>("dense_query(layer, rows, normed, positions, q)"),
    method<"dense_key_value", run_key_value>("dense_key_value(layer, rows, normed, positions, k, v)"),
    method<"dense_project", run_project>("dense_project(layer, rows, h, positions, q, k, v)"),
    method<"dense_finish", run_finish>("dense_finish(layer, rows, h, o, out)"),
    method<"dense_logits", run_logits>("dense_logits(head, rows, h, out)"),
    method<"dense_gather", run_gather>(
        "dense_gather(table, ids, out)\n\nCopies rows of table [n, width] by number, i64, to out [ids, width]."),
    method<"dense_unpack", run_unpack>(
        "dense_unpack(storage, blocks, values, threads)\n\nGGUF blocks u8 [rows, blocks, bytes] to values [rows, in]."),
    method<"dense_pack", run_pack>(
        "dense_pack(storage, blocks, packed, threads)\n\nGGUF blocks to the packed rows of kernels/cpu/packed.py."),
    method<"set_spin_us", run_set_spin_us>(
        "set_spin_us(microseconds)\n\nFor how long the pool's threads wait busily before they sleep."),
    NO_MORE_METHODS,
};
