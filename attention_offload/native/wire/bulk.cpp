#include "wire/bulk.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "wire/socket.h"

namespace farshore::wire {
namespace {

// The most pieces of one system call. IOV_MAX is 1,024; shorter calls give the core to other threads sooner.
constexpr size_t MAX_PIECES = 512;

// Calls move(message) until all pieces have moved. `move` is a system call that returns how many bytes it moved, or -1
// with errno. The time limit starts again with every byte that moves.
template <class Move>
void move_pieces(int fd, std::vector<iovec>& pieces, short events, const char* what, double idle_s, const Move& move) {
    size_t next = 0;
    const auto next_deadline = [&] { return idle_s < 0 ? NEVER : after(idle_s); };
    Deadline deadline = next_deadline();
    for (;;) {
        while (next < pieces.size() && pieces[next].iov_len == 0) next++;
        if (next == pieces.size()) return;
        msghdr message{};
        message.msg_iov = &pieces[next];
        message.msg_iovlen = std::min(MAX_PIECES, pieces.size() - next);
        ssize_t moved = move(message);
        if (moved < 0) {
            if (errno == EAGAIN || errno == EWOULDBLOCK) {
                wait_for(fd, events, deadline);
            } else if (errno != EINTR) {
                throw_errno(what);
            }
            continue;
        }
        if (moved > 0) deadline = next_deadline();
        for (; moved > 0; next++) {
            iovec& piece = pieces[next];
            const size_t bytes = std::min<size_t>(moved, piece.iov_len);
            moved -= bytes;
            if (bytes == piece.iov_len) continue;
            piece = {static_cast<char*>(piece.iov_base) + bytes, piece.iov_len - bytes};
            break;
        }
    }
}

}  // namespace

void send_pieces(int fd, std::vector<iovec> pieces, double idle_s) {
    move_pieces(fd, pieces, POLLOUT, "send", idle_s,
                [&](msghdr& message) { return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL); });
}

void receive_pieces(int fd, std::vector<iovec> pieces, double idle_s) {
    bool begun = false;
    move_pieces(fd, pieces, POLLIN, "receive", idle_s, [&](msghdr& message) {
        const ssize_t received = recvmsg(fd, &message, MSG_DONTWAIT);
        if (received == 0) {
            if (begun) throw Broken("truncated: the connection ended inside a transfer");
            throw HungUp("the other end closed the connection");
        }
        begun |= received > 0;
        return received;
    });
}

}  // namespace farshore::wire
