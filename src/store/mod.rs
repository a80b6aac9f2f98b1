//! Object stores by URI; nothing else talks to a bucket.
