// SPDX-License-Identifier: Apache-2.0
#include "hdf5_handle.hpp"

#include <string_view>

namespace annulus {

namespace {

// A file that a failing disk kept HDF5 from closing stays in its tables half destroyed, and its exit handler would crash on it. Every file
// here has an owner, so the handler is not needed; it can be declined only before HDF5's first call, hence during initialisation.
[[maybe_unused]] const herr_t kDeclinedExitHandler = H5dont_atexit();

std::recursive_mutex& library_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

herr_t keep_first(unsigned depth, const H5E_error2_t* error, void* message) {
  if (depth == 0 && error->desc != nullptr) { *static_cast<std::string*>(message) = error->desc; }
  return 0;
}

}  // namespace

Hdf5Lock::Hdf5Lock() : lock_(library_mutex()) {
  // Per thread where HDF5 is thread-safe, hence at every entry and not once.
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

void Hdf5Handle::reset() noexcept {
  if (id_ < 0) { return; }
  const Hdf5Lock lock;
  switch (static_cast<int>(H5Iget_type(id_))) {
    case H5I_FILE:
      H5Fclose(id_);
      break;
    case H5I_GROUP:
      H5Gclose(id_);
      break;
    case H5I_DATATYPE:
      H5Tclose(id_);
      break;
    case H5I_DATASPACE:
      H5Sclose(id_);
      break;
    case H5I_DATASET:
      H5Dclose(id_);
      break;
    case H5I_ATTR:
      H5Aclose(id_);
      break;
    case H5I_GENPROP_LST:
      H5Pclose(id_);
      break;
    default:
      H5Idec_ref(id_);
      break;
  }
  id_ = H5I_INVALID_HID;
}

std::string innermost_hdf5_error() {
  std::string message;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_first, &message);
  // The file driver buries the system's message among addresses and times.
  constexpr std::string_view kSystemMessage = "error message = '";
  if (const auto begin = message.find(kSystemMessage); begin != std::string::npos) {
    const auto text = begin + kSystemMessage.size();
    return message.substr(text, message.find('\'', text) - text);
  }
  return message.empty() ? "HDF5 gives no reason" : message;
}

template <class Status>
Status check_h5(Status status, const char* call, std::source_location where) {
  if (status < 0) {
    throw Hdf5Failure(fmt::format("HDF5: {} failed: {} ({}:{})", call, innermost_hdf5_error(), where.file_name(), where.line()));
  }
  return status;
}

template int check_h5(int, const char*, std::source_location);
template hid_t check_h5(hid_t, const char*, std::source_location);

}  // namespace annulus
