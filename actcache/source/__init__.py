"""Documents to token blocks: read them from wherever they lie, make sequences of them, keep each token's origin.

In: files, folders, `datasets` names or arrays of token ids, and a tokenizer. Out: `TokenBlocks`, token ids and document
numbers of shape `(Q, T)` in seeded random order. The only room that knows the `datasets` library.

    kinds.py            what a document can be: text, chat, token ids
    documents.py        a stream of them, and what becomes of a bad one
    columns.py          which column of a record holds it
    sniff.py            what a file is by its first bytes
    unpack.py           files opened, and unpacked
    jsons.py            JSON files
    text_files.py       which reader a file needs; plain text, CSV, tables, arrays
    dataset_folders.py  the files of a folder, and its splits
    read.py             files, folders and datasets, to a stream of documents
    chat.py             chats to text, through the tokenizer's template
    bos.py              the tokens that begin and end documents and sequences
    control.py          control tokens that a document spells
    tokenise.py         documents to token ids, many in one call of the tokenizer
    arguments.py        what may be given for documents, tokenizers and token blocks
    temporary.py        temporary files of tokens
    pack.py             token ids to sequences, in random order
"""

from actcache.source.arguments import as_token_blocks as as_token_blocks
from actcache.source.bos import BosPolicy as BosPolicy
from actcache.source.control import ControlTokens as ControlTokens
from actcache.source.documents import Documents as Documents
from actcache.source.documents import OnBad as OnBad
from actcache.source.kinds import Document as Document
from actcache.source.pack import Packing as Packing
from actcache.source.pack import token_blocks as token_blocks
from actcache.source.read import EMBEDDED_CORPUS as EMBEDDED_CORPUS
from actcache.source.read import is_streamed as is_streamed
from actcache.source.read import read_chats as read_chats
from actcache.source.read import read_documents as read_documents
from actcache.source.read import read_texts as read_texts
from actcache.source.read import read_tokens as read_tokens
