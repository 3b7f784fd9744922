"""What the commands do, as functions: chats, streams, what was kept, plans, speed."""
