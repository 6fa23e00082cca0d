"""What the network is and where its weights and tokenizer come from. Knows arrays, not requests, lanes or HTTP.

Shape letters, used everywhere: B lanes (rows) · T query tokens · S key positions · D model width · N query heads ·
K kv heads · G = N/K · H head width · F feed-forward width · V vocabulary · L layers · P pages · W tokens per page.
"""
