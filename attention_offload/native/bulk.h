// Bulk KV: bytes between a socket and pieces of memory, wherever these lie, in as few system calls as it takes.
#pragma once

#include <sys/uio.h>

#include <vector>

#include "frame.h"

namespace farshore::wire {

// In the order of the pieces, all of them, or an exception: HungUp, Broken or Late. The socket stays the caller's.
void send_pieces(int fd, std::vector<iovec> pieces, Deadline deadline);
void receive_pieces(int fd, std::vector<iovec> pieces, Deadline deadline);

}  // namespace farshore::wire
