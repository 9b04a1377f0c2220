"""Both services under a schedule of faults, with clients that notice every wrong token."""
