// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hdf5_handle.hpp"
#include "unfinished_path.hpp"

#include <cstdint>
#include <string>
#include <utility>

namespace annulus {

/// An HDF5 file that is written into the temporary file of `place`. Close all handles into it before commit() and the destructor.
class Hdf5File {
 public:
  /// @throws RuntimeFailure if the file cannot be created
  explicit Hdf5File(UnfinishedPath& place);
  /// Opens the file that `place` goes on with. @throws InvalidArgument if it is none of HDF5's
  static Hdf5File open(UnfinishedPath& place);
  Hdf5File(const Hdf5File&) = delete;
  Hdf5File& operator=(const Hdf5File&) = delete;

  hid_t get() const noexcept { return file_.get(); }
  std::string describe() const { return place_.describe(); }

  /// Writes what HDF5 holds back and takes the disk blocks of everything allocated so far and of `more` bytes, so that a full disk is found
  /// before hours of work. @throws RuntimeFailure if there is no room
  void reserve_allocated(std::int64_t more) const;

  /// Writes what HDF5 holds back, and sends it to the disk. @throws RuntimeFailure if the disk refuses
  void sync() const;

  /// Closes and publishes. @throws RuntimeFailure if the disk refuses, or as UnfinishedPath::publish()
  void commit();

 private:
  Hdf5File(UnfinishedPath& place, Hdf5Handle file) : place_(place), file_(std::move(file)) {}
  void flush() const;

  UnfinishedPath& place_;
  Hdf5Handle file_;
};

}  // namespace annulus
