#include "wire/bulk.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "wire/socket.h"

namespace farshore::wire {
namespace {

// Of one system call: IOV_MAX is 1,024, and whoever else wants this core should not wait for long.
constexpr size_t MOST_PIECES = 512;

// Calls move(message) until it has moved all pieces; it returns how many bytes it did, or fails as a system call.
// The deadline begins anew with every byte that moves.
template <class Move>
void each_call(int fd, std::vector<iovec>& pieces, short events, const char* what, double idle_s, const Move& move) {
    size_t at = 0;
    const auto next_deadline = [&] { return idle_s < 0 ? NEVER : after(idle_s); };
    Deadline deadline = next_deadline();
    for (;;) {
        while (at < pieces.size() && pieces[at].iov_len == 0) at++;
        if (at == pieces.size()) return;
        msghdr message{};
        message.msg_iov = &pieces[at];
        message.msg_iovlen = std::min(MOST_PIECES, pieces.size() - at);
        ssize_t moved = move(message);
        if (moved < 0) {
            if (errno == EAGAIN || errno == EWOULDBLOCK) {
                wait_for(fd, events, deadline);
            } else if (errno != EINTR) {
                broken(what);
            }
            continue;
        }
        if (moved > 0) deadline = next_deadline();
        for (; moved > 0; at++) {
            const size_t here = std::min<size_t>(moved, pieces[at].iov_len);
            moved -= here;
            if (here == pieces[at].iov_len) continue;
            pieces[at] = {static_cast<char*>(pieces[at].iov_base) + here, pieces[at].iov_len - here};
            break;
        }
    }
}

}  // namespace

void send_pieces(int fd, std::vector<iovec> pieces, double idle_s) {
    each_call(fd, pieces, POLLOUT, "send", idle_s,
              [&](msghdr& message) { return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL); });
}

void receive_pieces(int fd, std::vector<iovec> pieces, double idle_s) {
    bool begun = false;
    each_call(fd, pieces, POLLIN, "receive", idle_s, [&](msghdr& message) {
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
