#include "interrupt.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <signal.h>

namespace pyserve {
namespace {

// torch has it for its own tests; no operator has a kernel for it, so that each one that is called while it is on
// raises before it does anything.
constexpr c10::DispatchKey unanswered = c10::DispatchKey::TESTING_ONLY_GenericMode;

// Sets bits of the thread's own; the thread has asked for them before, so that nothing is allocated here.
void refuse_operators() noexcept { c10::impl::tls_set_dispatch_key_included(unanswered, true); }
void allow_operators() noexcept { c10::impl::tls_set_dispatch_key_included(unanswered, false); }

}  // namespace

void install_interrupts() {
    // Not the one that worker processes take (launch.INTERRUPT), nor one that has a name.
    Runs::install(SIGRTMIN + 8, {refuse_operators, allow_operators});
}

}  // namespace pyserve
