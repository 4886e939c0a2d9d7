#include "runtime/tensors.h"

#include <stdexcept>

namespace farshore {
namespace {

// As in dlpack.h, version 1 (github.com/dmlc/dlpack): the parts that are read.
struct ForeignTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dims;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct ExchangeApi {
    uint32_t major, minor;
    const void* previous;
    const void *allocate, *export_managed, *import_managed;
    int (*borrow)(void* tensor, ForeignTensor* out);  // may be null; -1 with a Python error
    const void* stream;
};
constexpr uint32_t MAJOR = 1;
constexpr int CPU = 1, FLOAT = 2, BFLOAT = 4;

PyTypeObject* tensor_type = nullptr;
const ExchangeApi* api = nullptr;
PyObject* describe = nullptr;

std::string attribute(PyObject* tensor, const char* which) {
    PyObject* value = PyObject_GetAttrString(tensor, which);
    PyObject* text = value ? PyObject_Str(value) : nullptr;
    const char* utf8 = text ? PyUnicode_AsUTF8(text) : nullptr;
    const std::string told = utf8 ? utf8 : "unknown";
    Py_XDECREF(value), Py_XDECREF(text);
    PyErr_Clear();
    return told;
}

std::invalid_argument unreadable(PyObject* tensor, const char* name) {
    PyErr_Clear();  // what PyTorch says of it, if anything
    return std::invalid_argument(std::string(name) + ": " + attribute(tensor, "dtype") + " on " +
                                 attribute(tensor, "device") + ": give float32, bfloat16 or float16 on the CPU");
}

View borrowed(PyObject* tensor, const char* name) {
    ForeignTensor t;
    if (api->borrow(tensor, &t) != 0) throw unreadable(tensor, name);
    View x;
    const int code = t.type_code, bits = t.type_bits;
    if (t.device_type != CPU || t.type_lanes != 1) throw unreadable(tensor, name);
    if (code == FLOAT && (bits == 32 || bits == 16))
        x.format = bits == 32 ? Format::f32 : Format::f16;
    else if (code == BFLOAT && bits == 16)
        x.format = Format::bf16;
    else
        throw unreadable(tensor, name);
    if (t.dims > 3) throw std::invalid_argument(std::string(name) + ": more than 3 dimensions");
    x.dims = t.dims;
    x.data = static_cast<char*>(t.data) + t.byte_offset;
    for (int i = 0; i < t.dims; i++) x.shape[i] = t.shape[i], x.strides[i] = t.strides[i];
    return x;
}

View described(PyObject* tensor, const char* name) {
    PyObject* tuple = PyObject_CallOneArg(describe, tensor);
    if (!tuple) throw std::runtime_error("a tensor that cannot be read");
    int64_t values[8];
    const Py_ssize_t count = PyTuple_Size(tuple);
    for (Py_ssize_t i = 0; i < count && i < 8; i++) values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    Py_DECREF(tuple);
    if (PyErr_Occurred()) throw std::runtime_error("a tensor that cannot be read");
    if (count > 8 || count < 2) throw std::invalid_argument(std::string(name) + ": more than 3 dimensions");
    if (values[count - 1] < 0) throw unreadable(tensor, name);
    View x;
    x.data = reinterpret_cast<void*>(values[0]);
    x.dims = static_cast<int>(count - 2) / 2;
    for (int i = 0; i < x.dims; i++) x.shape[i] = values[1 + i], x.strides[i] = values[1 + x.dims + i];
    x.format = static_cast<Format>(values[count - 1]);
    return x;
}

}  // namespace

View view_of(PyObject* tensor, const char* name) {
    if (!tensor_type || !PyObject_TypeCheck(tensor, tensor_type))
        throw std::invalid_argument(std::string(name) + ": not a tensor");
    return api ? borrowed(tensor, name) : described(tensor, name);
}

std::string mismatch(const char* name, const View& given, std::initializer_list<int64_t> expected) {
    const auto listed = [](const int64_t* begin, const int64_t* end) {
        std::string text = "(";
        for (const int64_t* it = begin; it != end; it++) text += (it == begin ? "" : ", ") + std::to_string(*it);
        return text + ")";
    };
    return std::string(name) + " of shape " + listed(given.shape, given.shape + given.dims) + ", expected " +
           listed(expected.begin(), expected.end());
}

void set_tensors(PyObject* type, PyObject* capsule, PyObject* function) {
    if (!PyType_Check(type)) throw std::invalid_argument("not a type");
    const ExchangeApi* found = nullptr;
    if (capsule != Py_None) {
        found = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        if (!found) throw std::runtime_error("not DLPack's exchange API");
        if (found->major != MAJOR || !found->borrow) found = nullptr;
    }
    api = found;
    Py_INCREF(type), Py_INCREF(function);
    Py_XDECREF(reinterpret_cast<PyObject*>(tensor_type)), Py_XDECREF(describe);
    tensor_type = reinterpret_cast<PyTypeObject*>(type);
    describe = function;
}

}  // namespace farshore
