"""The page at `/ui`: a chat, and the lanes as they work. Its files travel in the wheel and ask nobody else for anything."""
