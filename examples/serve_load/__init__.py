"""Load tests of servers, with clients of other projects."""
