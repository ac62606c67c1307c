"""AMD secure virtualisation and its kin: who gets a key, and in what state a guest is."""
