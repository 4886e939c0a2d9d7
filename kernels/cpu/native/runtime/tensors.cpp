#include "runtime/tensors.h"

#include "runtime/arguments.h"

namespace farshore {
namespace {

// The fields of dlpack.h, version 1 (github.com/dmlc/dlpack), that are read here.
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
    int (*borrow)(void* tensor, ForeignTensor* out);  // may be null; returns -1 with a Python exception
    const void* stream;
};
constexpr uint32_t MAJOR = 1;
constexpr int CPU = 1, INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4;

constexpr const char* ELEMENT_NAMES[] = {"float32", "bfloat16", "float16", "uint8", "int16", "int32", "int64"};
constexpr int ELEMENTS = 7;
constexpr const char* FLOATS = "float32, bfloat16 or float16";

PyTypeObject* tensor_type = nullptr;
const ExchangeApi* api = nullptr;
PyObject* describe = nullptr;

std::string attribute(PyObject* tensor, const char* which) {
    PyObject* value = PyObject_GetAttrString(tensor, which);
    PyObject* text = value ? PyObject_Str(value) : nullptr;
    const char* utf8 = text ? PyUnicode_AsUTF8(text) : nullptr;
    const std::string found = utf8 ? utf8 : "unknown";
    Py_XDECREF(value), Py_XDECREF(text);
    PyErr_Clear();
    return found;
}

// `expected`: the element types that the caller accepts.
std::invalid_argument unreadable(PyObject* tensor, const char* name, const char* expected) {
    PyErr_Clear();  // PyTorch's own exception, if any
    return std::invalid_argument(std::string(name) + ": " + attribute(tensor, "dtype") + " on " +
                                 attribute(tensor, "device") + ": give " + expected + " on the CPU");
}

std::invalid_argument too_many_dims(const char* name) {
    return std::invalid_argument(std::string(name) + ": more than 3 dimensions");
}

// -1: none of Element.
int element_number(int code, int bits) {
    if (code == FLOAT && bits == 32) return static_cast<int>(Element::f32);
    if (code == BFLOAT && bits == 16) return static_cast<int>(Element::bf16);
    if (code == FLOAT && bits == 16) return static_cast<int>(Element::f16);
    if (code == UINT && bits == 8) return static_cast<int>(Element::u8);
    if (code == INT && bits == 64) return static_cast<int>(Element::i64);
    if (code == INT && bits == 32) return static_cast<int>(Element::i32);
    if (code == INT && bits == 16) return static_cast<int>(Element::i16);
    return -1;
}

View borrowed(PyObject* tensor, const char* name, const char* expected) {
    ForeignTensor foreign;
    if (api->borrow(tensor, &foreign) != 0) throw unreadable(tensor, name, expected);
    const int element = element_number(foreign.type_code, foreign.type_bits);
    if (foreign.device_type != CPU || foreign.type_lanes != 1 || element < 0) throw unreadable(tensor, name, expected);
    if (foreign.dims > MAX_DIMS) throw too_many_dims(name);
    View view;
    view.element = static_cast<Element>(element);
    view.dims = foreign.dims;
    view.data = static_cast<char*>(foreign.data) + foreign.byte_offset;
    for (int i = 0; i < foreign.dims; i++) view.shape[i] = foreign.shape[i], view.strides[i] = foreign.strides[i];
    return view;
}

View described(PyObject* tensor, const char* name, const char* expected) {
    constexpr Py_ssize_t MAX_VALUES = 2 + 2 * MAX_DIMS;
    PyObject* tuple = PyObject_CallOneArg(describe, tensor);
    if (!tuple) throw std::runtime_error("a tensor that cannot be read");
    int64_t values[MAX_VALUES];
    const Py_ssize_t count = PyTuple_Size(tuple);
    for (Py_ssize_t i = 0; i < count && i < MAX_VALUES; i++) values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    Py_DECREF(tuple);
    if (PyErr_Occurred()) throw std::runtime_error("a tensor that cannot be read");
    if (count > MAX_VALUES || count < 2) throw too_many_dims(name);
    const int64_t element = values[count - 1];
    if (element < 0 || element >= ELEMENTS) throw unreadable(tensor, name, expected);
    View view;
    view.data = reinterpret_cast<void*>(values[0]);
    view.dims = static_cast<int>(count - 2) / 2;
    for (int i = 0; i < view.dims; i++) view.shape[i] = values[1 + i], view.strides[i] = values[1 + view.dims + i];
    view.element = static_cast<Element>(element);
    return view;
}

View view_of(PyObject* tensor, const char* name, const char* expected) {
    if (!tensor_type || !PyObject_TypeCheck(tensor, tensor_type))
        throw std::invalid_argument(std::string(name) + ": not a tensor");
    return api ? borrowed(tensor, name, expected) : described(tensor, name, expected);
}

bool is_contiguous(const View& view) {
    int64_t stride = 1;
    bool in_order = true;
    for (int i = view.dims - 1; i >= 0; i--) {
        if (view.shape[i] == 0) return true;
        if (view.shape[i] != 1) in_order &= view.strides[i] == stride;
        stride *= view.shape[i];
    }
    return in_order;
}

}  // namespace

View float_view(PyObject* tensor, const char* name) {
    const View view = view_of(tensor, name, FLOATS);
    if (view.element > Element::f16) throw unreadable(tensor, name, FLOATS);
    return view;
}

View contiguous_view(PyObject* tensor, const char* name, Element element, int dims) {
    const char* expected = ELEMENT_NAMES[static_cast<int>(element)];
    const View view = view_of(tensor, name, expected);
    if (view.element != element) throw unreadable(tensor, name, expected);
    if (view.dims != dims)
        throw std::invalid_argument(std::string(name) + ": " + std::to_string(view.dims) + " dimensions, expected " +
                                    std::to_string(dims));
    if (!is_contiguous(view)) throw std::invalid_argument(std::string(name) + ": must be contiguous");
    return view;
}

std::string mismatch(const char* name, const View& given, std::initializer_list<int64_t> expected) {
    const auto listed = [](const int64_t* begin, const int64_t* end) {
        std::string text = "(";
        for (const int64_t* size = begin; size != end; size++)
            text += (size == begin ? "" : ", ") + std::to_string(*size);
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
        if (!found) throw PythonError();
        if (found->major != MAJOR || !found->borrow) found = nullptr;
    }
    api = found;
    Py_INCREF(type), Py_INCREF(function);
    Py_XDECREF(reinterpret_cast<PyObject*>(tensor_type)), Py_XDECREF(describe);
    tensor_type = reinterpret_cast<PyTypeObject*>(type);
    describe = function;
}

}  // namespace farshore
