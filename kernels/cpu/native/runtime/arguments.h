// Typed, checked views of the arguments of a Python call. Header only: used by all three native modules.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <concepts>
#include <cstdint>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace farshore {

// Thrown when a Python exception is already set.
struct PythonError : std::exception {};

// Sets a Python exception and throws PythonError. `format` is that of PyErr_Format.
template <class... Values>
[[noreturn]] void raise(PyObject* type, const char* format, Values... values) {
    PyErr_Format(type, format, values...);
    throw PythonError();
}

// A bytes-like argument. Its memory stays valid until this object ends; needs the GIL.
class Bytes {
  public:
    explicit Bytes(PyObject* object) {
        if (PyObject_GetBuffer(object, &buffer_, PyBUF_SIMPLE) != 0) throw PythonError();
    }
    ~Bytes() { PyBuffer_Release(&buffer_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    const void* data() const { return buffer_.buf; }
    Py_ssize_t size() const { return buffer_.len; }

  private:
    Py_buffer buffer_;
};

// Reads the arguments of one call, or the items of one tuple or list, in their declared order. An argument may be
// given by position or by keyword; each read passes the argument's name, which a keyword must equal and which errors
// begin with ("plan: layout.block_tokens: ...").
//
// A missing argument or one of a wrong kind raises TypeError. A number out of range throws std::invalid_argument.
// Objects are borrowed from the caller of the Python function. Reading positional arguments allocates nothing.
class Arguments {
  public:
    // As METH_FASTCALL | METH_KEYWORDS passes them: `count` values by position, then one for each of `keywords`
    // (a tuple of names, or null).
    Arguments(const char* function, PyObject* const* values, Py_ssize_t count, PyObject* keywords)
        : name_(function), outer_(nullptr), values_(values), count_(count), keywords_(keywords) {}
    Arguments(const Arguments&) = delete;
    Arguments& operator=(const Arguments&) = delete;

    PyObject* object(const char* name) { return next_ < count_ ? values_[next_++] : by_keyword(name); }

    // Within the limits of T, and within [least, most].
    template <std::integral T>
    T integer(const char* name, T least = std::numeric_limits<T>::min(), T most = std::numeric_limits<T>::max()) {
        PyObject* value = object(name);
        const long long number = PyLong_AsLongLong(value);
        if (number == -1 && PyErr_Occurred()) not_an_integer(name, value);
        if (!std::in_range<T>(number)) does_not_fit(name, number, 8 * sizeof(T), std::unsigned_integral<T>);
        if (static_cast<T>(number) < least || static_cast<T>(number) > most)
            out_of_range(name, number, static_cast<long long>(least), static_cast<long long>(most));
        return static_cast<T>(number);
    }

    // A number of things: 0 or more, in 32 bits.
    int count(const char* name) { return integer<int>(name, 0); }

    // An enumerator of E, from 0 to `last`.
    template <class E>
    E choice(const char* name, E last) {
        return static_cast<E>(integer<int>(name, 0, static_cast<int>(last)));
    }

    double real(const char* name) {
        PyObject* value = object(name);
        const double number = PyFloat_AsDouble(value);
        if (number == -1.0 && PyErr_Occurred()) wrong_kind(name, "a number", value);
        return number;
    }

    bool boolean(const char* name) {
        const int truth = PyObject_IsTrue(object(name));
        if (truth < 0) throw PythonError();
        return truth;
    }

    // An address as an integer. The caller of the Python function keeps the memory alive and checks its size.
    template <class T>
    T* address(const char* name) {
        T* address = address_or_null<T>(name);
        if (!address) throw std::invalid_argument(where(name) + ": the address is 0");
        return address;
    }
    template <class T>
    T* address_or_null(const char* name) {
        PyObject* value = object(name);
        void* address = PyLong_AsVoidPtr(value);
        if (!address && PyErr_Occurred()) not_an_integer(name, value);
        return static_cast<T*>(address);
    }

    // What a capsule of the name `kind` points to; see capsule.h.
    template <class T>
    T& content(const char* name, const char* kind) {
        PyObject* value = object(name);
        void* content = PyCapsule_GetPointer(value, kind);
        if (!content) wrong_kind(name, kind, value);
        return *static_cast<T*>(content);
    }

    Bytes bytes(const char* name) { return Bytes(object(name)); }

    // The items of a tuple or list. The result must not outlive these arguments.
    Arguments items(const char* name) {
        PyObject* value = object(name);
        if (PyTuple_Check(value))
            return {name, this, reinterpret_cast<PyTupleObject*>(value)->ob_item, PyTuple_GET_SIZE(value)};
        if (PyList_Check(value))
            return {name, this, reinterpret_cast<PyListObject*>(value)->ob_item, PyList_GET_SIZE(value)};
        wrong_kind(name, "a tuple or list", value);
    }

    // How many values by position were not read yet.
    Py_ssize_t left() const { return count_ - next_; }

    // After the last read: raises TypeError if there are arguments that were not read.
    void end() const {
        const Py_ssize_t named = keywords_ ? PyTuple_GET_SIZE(keywords_) : 0;
        if (next_ != count_) raise(PyExc_TypeError, "%s: %zd arguments too many", path().c_str(), count_ - next_);
        for (Py_ssize_t i = 0; named_reads_ != named && i < named; i++)
            if (!(read_ >> i & 1))
                raise(PyExc_TypeError, "%s: unexpected argument %U", path().c_str(), PyTuple_GET_ITEM(keywords_, i));
    }

    // How errors name an argument.
    std::string where(const char* name) const { return path() + (outer_ ? "." : ": ") + name; }

    [[noreturn, gnu::cold]] void wrong_kind(const char* name, const char* expected, PyObject* value) const {
        PyErr_Clear();
        raise(PyExc_TypeError, "%s: expected %s, got %s", where(name).c_str(), expected, Py_TYPE(value)->tp_name);
    }

  private:
    Arguments(const char* name, const Arguments* outer, PyObject* const* values, Py_ssize_t count)
        : name_(name), outer_(outer), values_(values), count_(count), keywords_(nullptr) {}

    std::string path() const { return outer_ ? outer_->where(name_) : name_; }

    PyObject* by_keyword(const char* name) {
        const Py_ssize_t count = keywords_ ? PyTuple_GET_SIZE(keywords_) : 0;
        for (Py_ssize_t i = 0; i < count; i++) {
            // Callers mostly write keywords in the order of the reads: the search begins there.
            const Py_ssize_t at = (named_reads_ + i) % count;
            if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords_, at), name) != 0) continue;
            named_reads_++;
            read_ |= uint64_t{1} << at;
            return values_[count_ + at];
        }
        raise(PyExc_TypeError, "%s: missing", where(name).c_str());
    }

    [[noreturn, gnu::cold]] void not_an_integer(const char* name, PyObject* value) const {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            throw std::invalid_argument(where(name) + ": the integer does not fit into 64 bits");
        }
        wrong_kind(name, "an integer", value);
    }
    [[noreturn, gnu::cold]] void does_not_fit(const char* name, long long number, size_t bits, bool is_unsigned) const {
        throw std::invalid_argument(where(name) + ": " + std::to_string(number) + " does not fit into " +
                                    std::to_string(bits) + (is_unsigned ? " bits without a sign" : " bits"));
    }
    [[noreturn, gnu::cold]] void out_of_range(const char* name, long long number, long long least,
                                              long long most) const {
        throw std::invalid_argument(where(name) + ": " + std::to_string(number) + " is not in " +
                                    std::to_string(least) + " to " + std::to_string(most));
    }

    const char* name_;  // of the function, or of the argument whose items these are
    const Arguments* outer_;
    PyObject* const* values_;
    Py_ssize_t count_;
    PyObject* keywords_;
    Py_ssize_t next_ = 0;
    Py_ssize_t named_reads_ = 0;
    uint64_t read_ = 0;  // bit i: keyword i was read; no function has more than 64
};

}  // namespace farshore
