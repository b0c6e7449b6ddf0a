// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/error.hpp>

#include <hdf5.h>

#include <mutex>
#include <source_location>
#include <string>
#include <utility>

namespace annulus {

/// Holds the one lock around the HDF5 library, which distributions build without thread safety, and keeps HDF5 from printing its errors.
/// Recursive, so that handles may close while a caller holds it. Every call into HDF5 happens under one.
class Hdf5Lock {
 public:
  Hdf5Lock();

 private:
  std::unique_lock<std::recursive_mutex> lock_;
};

/// One HDF5 identifier of any kind: file, group, dataset, space, type, property list, attribute.
class Hdf5Handle {
 public:
  Hdf5Handle() noexcept = default;
  explicit Hdf5Handle(hid_t id) noexcept : id_(id) {}
  ~Hdf5Handle() { reset(); }
  Hdf5Handle(const Hdf5Handle&) = delete;
  Hdf5Handle& operator=(const Hdf5Handle&) = delete;
  Hdf5Handle(Hdf5Handle&& other) noexcept : id_(std::exchange(other.id_, H5I_INVALID_HID)) {}
  Hdf5Handle& operator=(Hdf5Handle&& other) noexcept {
    if (this != &other) {
      reset();
      id_ = std::exchange(other.id_, H5I_INVALID_HID);
    }
    return *this;
  }

  hid_t get() const noexcept { return id_; }
  explicit operator bool() const noexcept { return id_ >= 0; }
  /// Closes it, whatever HDF5 answers; whoever must know (a file that was written) closes by release() and a check.
  void reset() noexcept;
  hid_t release() noexcept { return std::exchange(id_, H5I_INVALID_HID); }

 private:
  hid_t id_ = H5I_INVALID_HID;
};

/// The innermost message of HDF5's error stack: for a failed system call the system's own words.
std::string innermost_hdf5_error();

/// A call into HDF5 that failed.
class Hdf5Failure : public RuntimeFailure {
 public:
  using RuntimeFailure::RuntimeFailure;
};

/// `status` of `call` if it is not negative.
/// @throws Hdf5Failure with `call`, HDF5's innermost message and the place
template <class Status>
Status check_h5(Status status, const char* call, std::source_location where = std::source_location::current());

}  // namespace annulus
