// SPDX-License-Identifier: Apache-2.0
#include "hdf5_file.hpp"

#include <annulus/core/error.hpp>

#include <cstdlib>

namespace annulus {

namespace {

Hdf5Handle make_access() {
  Hdf5Handle access(check_h5(H5Pcreate(H5P_FILE_ACCESS), "H5Pcreate"));
  // Whatever handle an exception left open, closing the file closes it.
  check_h5(H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG), "H5Pset_fclose_degree");
#if H5_VERSION_GE(1, 10, 7)
  // Nobody else writes it, by the name or by a lock of UnfinishedPath, and many file systems refuse locks, each with an errno of its own
  // (of which HDF5 forgives only ENOSYS). HDF5_USE_FILE_LOCKING in the environment overrides this.
  check_h5(H5Pset_file_locking(access.get(), false, true), "H5Pset_file_locking");
#endif
  return access;
}

}  // namespace

Hdf5File::Hdf5File(UnfinishedPath& place) : place_(place) {
  place_.restart();
  const Hdf5Lock lock;
  const Hdf5Handle access = make_access();
  file_ = Hdf5Handle(H5Fcreate(place_.temporary().c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()));
  if (!file_) {
    const std::string reason = innermost_hdf5_error();
    const char* locking = std::getenv("HDF5_USE_FILE_LOCKING");
    throw RuntimeFailure(
        fmt::format("{}: '{}' cannot be created: {}{}", describe(), place_.temporary(), reason,
                    locking == nullptr ? "" : fmt::format(" (HDF5_USE_FILE_LOCKING is {}; FALSE does without locks)", locking)));
  }
  // HDF5 opens files by name only, and writes through a descriptor ever after.
  void* descriptor = nullptr;
  if (H5Fflush(file_.get(), H5F_SCOPE_LOCAL) >= 0 && H5Fget_vfd_handle(file_.get(), access.get(), &descriptor) >= 0) {
    place_.lose_name(*static_cast<const int*>(descriptor));
  }
}

Hdf5File Hdf5File::open(UnfinishedPath& place) {
  const Hdf5Lock lock;
  const Hdf5Handle access = make_access();
  Hdf5Handle file(H5Fopen(place.temporary().c_str(), H5F_ACC_RDWR, access.get()));
  ANNULUS_EXPECTS(file, "{}: '{}' cannot be gone on with: {}", place.describe(), place.temporary(), innermost_hdf5_error());
  return {place, std::move(file)};
}

void Hdf5File::flush() const {
  const Hdf5Lock lock;
  if (H5Fflush(file_.get(), H5F_SCOPE_LOCAL) < 0) {
    throw RuntimeFailure(fmt::format("{} cannot be written: {}", describe(), innermost_hdf5_error()));
  }
}

void Hdf5File::sync() const {
  flush();
  place_.sync();
}

void Hdf5File::reserve_allocated(std::int64_t more) const {
  hsize_t bytes = 0;
  {
    const Hdf5Lock lock;
    flush();
    check_h5(H5Fget_filesize(file_.get(), &bytes), "H5Fget_filesize");
  }
  place_.reserve(checked_narrow<std::int64_t>(bytes) + more);
}

void Hdf5File::commit() {
  ANNULUS_ASSERT(file_, "{} is committed twice", describe());
  {
    const Hdf5Lock lock;
    // A failed close leaves no file to close again, hence release(), and hence the flush, which finds nearly every failure first.
    if (H5Fflush(file_.get(), H5F_SCOPE_LOCAL) < 0 || H5Fclose(file_.release()) < 0) {
      throw RuntimeFailure(fmt::format("{} cannot be written: {}", describe(), innermost_hdf5_error()));
    }
  }
  place_.publish();
}

}  // namespace annulus
