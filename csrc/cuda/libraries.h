// The CUDA libraries, opened at run time: which copies, from where, with which symbols.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/types.h"

namespace lowrank {
namespace cuda {

enum Library { kCudart, kCublas, kCusolver, kLibraries };

// A missing library or symbol, or a call that returned an error.
class CudaLibraryError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct OpenedLibrary {
  std::string soname;  // as asked for
  std::string path;    // where it lies; empty: not found
  std::string origin;  // "already loaded", "folder" or "system"
  std::string error;   // why it was not found: everything that was tried
  void* handle = nullptr;
};

std::string cuda_error_name(int error);
std::string cublas_status_name(int status);
std::string cusolver_status_name(int status);

// One foreign function. Calling it throws CudaLibraryError, with library, symbol and status name, unless all went well.
template <class Function>
class Symbol;

template <class Status, class... Arguments>
class Symbol<Status(Arguments...)> {
 public:
  Symbol(Library library, const char* name, const OpenedLibrary* libraries)
      : library_(library), name_(name), libraries_(libraries) {}
  bool resolved() const { return function_ != nullptr; }
  Library library() const { return library_; }
  const char* name() const { return name_; }
  void set(void* address) { function_ = reinterpret_cast<Status (*)(Arguments...)>(address); }

  void operator()(Arguments... arguments) const {
    if (function_ == nullptr) throw CudaLibraryError(std::string(name_) + " is missing: " + where());
    const int status = static_cast<int>(function_(arguments...));
    if (status != 0) {
      const std::string status_name = library_ == kCublas     ? cublas_status_name(status)
                                      : library_ == kCusolver ? cusolver_status_name(status)
                                                              : cuda_error_name(status);
      throw CudaLibraryError(std::string(name_) + " returned " + status_name + " (" + std::to_string(status) + "), " +
                             where());
    }
  }

 private:
  std::string where() const {
    const OpenedLibrary& opened = libraries_[library_];
    return opened.handle == nullptr ? opened.error : opened.soname + " (" + opened.path + ") " + "was opened";
  }

  Library library_;
  const char* name_;
  const OpenedLibrary* libraries_;
  Status (*function_)(Arguments...) = nullptr;
};

// All libraries of one CUDA major version, and the table of their functions.
class Libraries {
 public:
  // Majors are tried in order; the first of which any library is found wins, copies already in the process before all.
  Libraries(std::vector<int> majors, std::vector<std::string> folders, bool use_loaded, bool use_system);
  Libraries(const Libraries&) = delete;
  Libraries& operator=(const Libraries&) = delete;

  int major() const { return major_; }
  const OpenedLibrary& library(Library which) const { return opened_[which]; }
  std::vector<std::string> missing_symbols() const;
  std::vector<std::string> symbol_names() const;

 private:
  OpenedLibrary opened_[kLibraries];
  int major_ = 0;
  std::vector<std::string> missing_;

 public:
#define LOWRANK_SYMBOL(library, name, status, arguments) Symbol<status arguments> name{library, #name, opened_};
#include "cuda/symbols.h"
#undef LOWRANK_SYMBOL
};

}  // namespace cuda
}  // namespace lowrank
