// Releases Python's global interpreter lock (GIL) around native work. Used by all three native modules.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace farshore {

// Releases the GIL for its lifetime; the destructor takes the GIL again, also when an exception passes.
class GilRelease {
  public:
    GilRelease() : state_(PyEval_SaveThread()) {}
    ~GilRelease() { PyEval_RestoreThread(state_); }
    GilRelease(const GilRelease&) = delete;
    GilRelease& operator=(const GilRelease&) = delete;

  private:
    PyThreadState* state_;
};

// Calls `work` without the GIL and returns what it returns. `work` must not touch Python objects.
template <class Work>
decltype(auto) without_gil(Work&& work) {
    const GilRelease released;
    return work();
}

}  // namespace farshore
