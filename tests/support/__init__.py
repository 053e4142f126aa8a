"""What tests share: fakes, servers, archives, clients."""
