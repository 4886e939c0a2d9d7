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

Storage packed_storage(Arguments& arguments) {
    return static_cast<Storage>(
        arguments.integer<int>("storage", static_cast<int>(Storage::q4), static_cast<int>(Storage::q6_k)));
}

// A packed matrix [out][in] in u8 [packed_bytes].
Linear packed_matrix(Arguments& arguments, Storage storage, int out, int in) {
    const std::string where = arguments.where("rows");
    if (in % block_size(storage).weights)
        throw std::invalid_argument(where + ": " + std::to_string(in) + " weights a row are no whole blocks");
    const auto* rows = vector_of<uint8_t>(arguments.object("rows"), where.c_str(), packed_bytes(storage, out, in));
    return {rows, nullptr, out, in, storage};
}

// A matrix as (storage, out, in, rows, bias [out] or None): rows are values [out, in], or packed.
Linear linear_of(Arguments& arguments, const char* name, std::optional<Format>& format) {
    Arguments items = arguments.items(name);
    const auto storage = items.choice("storage", Storage::q6_k);
    const int out = items.count("out"), in = items.count("in");
    Linear linear{};
    if (storage != Storage::plain) {
        if (format && *format != Format::bf16)
            throw std::invalid_argument(items.where("rows") + ": packed weights need a layer in bfloat16");
        linear = packed_matrix(items, storage, out, in);
    } else {
        const View rows = weights_of(items, "rows", 2, format);
        if (rows.shape[0] != out || rows.shape[1] != in)
            throw std::invalid_argument(mismatch(items.where("rows").c_str(), rows, {out, in}));
        linear = {rows.data, nullptr, out, in, storage};
    }
    PyObject* bias = items.object("bias");
    items.end();
    if (bias != Py_None) {
        const std::string where = items.where("bias");
        const View view = contiguous_view(bias, where.c_str(), static_cast<Element>(*format), 1);
        if (view.shape[0] != linear.out) throw std::invalid_argument(mismatch(where.c_str(), view, {linear.out}));
        linear.bias = view.data;
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

// Raises IndexError for an id that is not in 0 .. rows.
void check_ids(const int64_t* ids, int64_t count, int64_t rows) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= rows)
            raise(PyExc_IndexError, "token id %lld of %lld", static_cast<long long>(ids[i]),
                  static_cast<long long>(rows));
}

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
    const auto* numbers = static_cast<const int64_t*>(ids.data);
    check_ids(numbers, ids.shape[0], table.shape[0]);
    for (int64_t r = 0; r < ids.shape[0]; r++)
        std::memcpy(to + r * row_bytes, from + numbers[r] * row_bytes, row_bytes);
}

void run_gather_packed(Arguments& arguments) {
    const Storage storage = packed_storage(arguments);
    const int rows = arguments.count("out"), in = arguments.count("in");
    const Linear matrix = packed_matrix(arguments, storage, rows, in);
    const View ids = contiguous_view(arguments.object("ids"), "ids", Element::i64, 1);
    const View values = contiguous_view(arguments.object("values"), "values", Element::bf16, 2);
    const int threads = arguments.integer<int>("threads");
    arguments.end();
    if (values.shape[0] != ids.shape[0] || values.shape[1] != in)
        throw std::invalid_argument(mismatch("values", values, {ids.shape[0], in}));
    const auto* numbers = static_cast<const int64_t*>(ids.data);
    check_ids(numbers, ids.shape[0], matrix.out);
    without_gil(
        [&] { kernels().dense.unpack(matrix, numbers, ids.shape[0], threads, static_cast<uint16_t*>(values.data)); });
}

// u8 [rows, blocks, bytes of a block].
View blocks_of(Arguments& arguments, Storage storage) {
    const View blocks = contiguous_view(arguments.object("blocks"), "blocks", Element::u8, 3);
    const BlockSize size = block_size(storage);
    if (blocks.shape[2] != size.bytes)
        throw std::invalid_argument(mismatch("blocks", blocks, {blocks.shape[0], blocks.shape[1], size.bytes}));
    return blocks;
}

void run_dequantise(Arguments& arguments) {
    const Storage storage = packed_storage(arguments);
    const View blocks = blocks_of(arguments, storage);
    const View values = contiguous_view(arguments.object("values"), "values", Element::f32, 2);
    const int threads = arguments.integer<int>("threads");
    arguments.end();
    const int64_t in = block_size(storage).weights * blocks.shape[1];
    if (values.shape[0] != blocks.shape[0] || values.shape[1] != in)
        throw std::invalid_argument(mismatch("values", values, {blocks.shape[0], in}));
    without_gil([&] {
        dequantise_blocks(storage, static_cast<const uint8_t*>(blocks.data), blocks.shape[0], blocks.shape[1],
                          static_cast<float*>(values.data), threads);
    });
}

void run_pack(Arguments& arguments) {
    const Storage storage = packed_storage(arguments);
    const View blocks = blocks_of(arguments, storage);
    const int64_t in = block_size(storage).weights * blocks.shape[1];
    auto* packed = const_cast<uint8_t*>(
        vector_of<uint8_t>(arguments.object("packed"), "packed", packed_bytes(storage, blocks.shape[0], in)));
    const int threads = arguments.integer<int>("threads");
    arguments.end();
    without_gil([&] {
        pack_blocks(storage, static_cast<const uint8_t*>(blocks.data), blocks.shape[0], blocks.shape[1], packed,
                    threads);
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
        " each matrix (storage, out, in, rows, bias or None). All float32 or all bfloat16; packed rows u8 [bytes], for"
        " bfloat16; contiguous; they must outlive the capsule."),
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
    method<"dense_gather_packed", run_gather_packed>(
        "dense_gather_packed(storage, out, in, rows, ids, values, threads)\n\nUnpacks rows of a packed matrix by number,"
        " i64, to values, bfloat16 [ids, in]."),
    method<"dense_dequantise", run_dequantise>(
        "dense_dequantise(storage, blocks, values, threads)\n\nGGUF blocks u8 [rows, blocks, bytes] to values, float32"
        " [rows, in]."),
    method<"dense_pack", run_pack>(
        "dense_pack(storage, blocks, packed, threads)\n\nGGUF blocks to a packed matrix, u8 [bytes]."),
    method<"set_spin_us", run_set_spin_us>(
        "set_spin_us(microseconds)\n\nFor how long the pool's threads wait busily before they sleep."),
    NO_MORE_METHODS,
};
